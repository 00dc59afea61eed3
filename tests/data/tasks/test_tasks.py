"""Every task, from its options to batches, and its description."""

import dataclasses

import numpy as np
import pytest
import tokenizers

from moe_jax.data import (
  TASKS,
  CharsOptions,
  DataOptions,
  GettextSource,
  JsonOptions,
  PythonStdlibSource,
  SpanCorruptionTask,
  Ul2Task,
  batch_dataset,
  load,
  read_pairs,
)

PART = PythonStdlibSource('email,json')
PAIRS = GettextSource('de,fr')
DECODER = {'tokens', 'targets', 'segment_ids', 'positions', 'loss_weights'}
ENCODER = {'encoder_tokens', 'encoder_segment_ids', 'encoder_positions'}


def config(task, **more):
  """Returns options with a task, which is a kind or the task's options."""
  task = TASKS.get(task)() if isinstance(task, str) else task
  source = PAIRS if 'pairs' in task.reads else PART
  return DataOptions(source=source, seq_len=60, task=task, **more)


def batch_of(dataset, i=3):
  return batch_dataset(dataset.splits['train'], batch_size=5, seed=0)[i]


@pytest.mark.parametrize(
  ('task', 'V'),
  # The vocabulary has 256 bytes and an end of text, and for some tasks 100
  # sentinels and 3 modes.
  [
    ('prefix_lm', 257),
    ('span_corruption', 357),
    ('ul2', 360),
    ('seq2seq', 257),
  ],
)
@pytest.mark.parametrize('target_len', [0, 50])
def test_batches_are_as_promised(task, V, target_len):
  dataset = load(config(task, target_len=target_len))
  assert dataset.vocab_size == V
  batch = batch_of(dataset)
  assert batch.keys() == (DECODER | ENCODER if target_len else DECODER)
  for name, values in batch.items():
    T = target_len if target_len and name in DECODER else 60
    assert values.shape == (5, T)
    assert values.dtype == (np.float32 if name == 'loss_weights' else np.int32)
  real = batch['segment_ids'] > 0
  assert not batch['loss_weights'][~real].any()
  assert (batch['positions'][~real] == 0).all()
  for name in batch.keys() & {'tokens', 'targets', 'encoder_tokens'}:
    assert batch[name].max() < V
  if target_len:
    # All targets have a loss, and each of a decoder's segments begins with the
    # start token.
    assert (batch['loss_weights'] == real).all()
    starts = real & (batch['positions'] == 0)
    assert (batch['tokens'][starts] == dataset.tokenizer.start_id).all()
    inside = real[:, 1:] & ~starts[:, 1:]
    np.testing.assert_array_equal(
      batch['tokens'][:, 1:][inside], batch['targets'][:, :-1][inside]
    )
    num_segments = batch['encoder_segment_ids'].max(1)
    assert (batch['segment_ids'].max(1) == num_segments).all()
  else:
    learned_share = batch['loss_weights'].sum() / real.sum()
    assert 0.05 < learned_share < 0.95
  assert dataset.tokenizer.decode(batch['targets'].reshape(-1))


def test_a_spans_text_comes_from_the_corpus():
  dataset = load(config('span_corruption', target_len=30))
  batch = batch_of(dataset)
  text = dataset.tokenizer.decode(batch['encoder_tokens'][0])
  assert '<extra_id_0>' in text and '<extra_id_1>' in text
  assert dataset.tokenizer.decode(batch['targets'][0]).startswith(
    '<extra_id_0>'
  )


def test_a_decoder_only_prefix_lm_is_the_text_itself():
  dataset = load(config('prefix_lm'))
  eos = dataset.tokenizer.eos_id
  rows = dataset.splits['validation']
  batch = rows.take(np.arange(len(rows)))
  # No token stands between prefix and suffix: a document's end of text is never
  # an input.
  assert not (batch['tokens'] == eos).any()
  assert (batch['targets'] == eos).sum() == dataset.counts['validation'][
    'documents'
  ]
  # The loss covers each segment from the split to its end.
  weights = batch['loss_weights']
  real = batch['segment_ids'] > 0
  inside = real[:, 1:] & (batch['positions'][:, 1:] > 0)
  assert (np.diff(weights, axis=1)[inside] >= 0).all()


def test_tasks_on_a_text_share_its_tokens_and_digest(tmp_path):
  datasets = [
    load(config(task, target_len=n, cache_dir=str(tmp_path)))
    for task, n in (('lm', 0), ('span_corruption', 40), ('prefix_lm', 40))
  ]
  assert len({dataset.digest for dataset in datasets}) == 1
  assert len(list((tmp_path / 'tokens').iterdir())) == 1


def test_describe_says_what_is_learned():
  text = load(config('span_corruption', target_len=50)).describe()
  assert '\ntask: span_corruption\n' in text and 'V=357' in text
  assert 'rows of T_enc=60 and T_dec=50, padding ' in text
  dataset = load(config('seq2seq', target_len=50))
  text = dataset.describe()
  counts = dataset.counts['train']
  assert f'{counts["pairs"]:,} pairs, ' in text
  assert counts['truncated'] > 0
  assert f'{counts["truncated"]:,} truncated, ' in text
  assert f'{sum(c["pairs"] for c in dataset.counts.values()):,} pairs' in text


def pairs_of(dataset):
  """Returns the texts of all inputs and of all targets for training."""
  rows = dataset.splits['train']
  batch = rows.take(np.arange(len(rows)))
  sides = []
  for tokens, segments in (
    ('encoder_tokens', 'encoder_segment_ids'),
    ('targets', 'segment_ids'),
  ):
    sides.append(
      [
        dataset.tokenizer.decode(ids[segment_ids == s])
        for ids, segment_ids in zip(batch[tokens], batch[segments])
        for s in range(1, segment_ids.max() + 1)
      ]
    )
  return sides


def test_truncated_pairs_are_those_too_long():
  roomy = dataclasses.replace(config('seq2seq', target_len=900), seq_len=900)
  whole = load(roomy)
  assert whole.counts['train']['truncated'] == 0
  long = [
    len(inputs.encode()) + 1 > 60 or len(targets.encode()) + 1 > 50
    for inputs, targets in zip(*pairs_of(whole))
  ]
  short = load(config('seq2seq', target_len=50))
  assert len(long) == short.counts['train']['pairs']
  assert sum(long) == short.counts['train']['truncated']
  assert sorted(t[:20] for t in pairs_of(short)[1]) == sorted(
    t[:20] for t in pairs_of(whole)[1]
  )


def test_characters_get_an_eos():
  dataset = load(config('seq2seq', tokenizer=CharsOptions()))
  eos = dataset.tokenizer.eos_id
  assert eos == dataset.vocab_size - 1
  assert (batch_of(dataset)['targets'] == eos).any()


@pytest.mark.parametrize(
  ('task', 'wrong', 'message'),
  [
    (Ul2Task, {'num_sentinels': -1}, 'num_sentinels=-1'),
    (Ul2Task, {'num_sentinels': 3}, 'num_sentinels=3 is below'),
    (SpanCorruptionTask, {'noise_density': 1.5}, 'noise_density=1.5'),
    (SpanCorruptionTask, {'mean_noise_span': 0.5}, 'mean_noise_span=0.5'),
  ],
)
def test_wrong_options(task, wrong, message):
  with pytest.raises(ValueError, match=message):
    load(config(task(**wrong)))


def test_a_row_that_is_too_short():
  with pytest.raises(ValueError, match='T_dec=2 are too short'):
    load(config('span_corruption', target_len=2))


@pytest.mark.parametrize(
  ('task', 'generates', 'goes_on'),
  [
    ('lm', False, True),
    ('prefix_lm', True, True),
    ('span_corruption', False, False),
    ('ul2', False, False),
    ('seq2seq', True, False),
  ],
)
def test_what_others_ask_a_task(task, generates, goes_on):
  options = config(task)
  assert options.task.generates == generates
  assert options.task.answers_go_on == goes_on
  # The text of a decoder's row shows whether an end of text stands between
  # inputs and answer.
  dataset = load(options)
  row = dataset.splits['train'][0]
  inside = row['segment_ids'] == 1
  eos = dataset.tokenizer.eos_id
  assert (eos in row['tokens'][inside]) == (not goes_on)


def test_pairs_are_read_as_texts():
  options = config('seq2seq')
  pairs = list(read_pairs(options, 'validation'))
  assert len(pairs) == load(options).counts['validation']['pairs']
  assert all(inputs[:4] in ('de: ', 'fr: ') for inputs, _ in pairs)
  prefixed = dataclasses.replace(
    options, task=dataclasses.replace(options.task, input_prefix='say ')
  )
  (inputs, target), *_ = read_pairs(prefixed, 'validation')
  assert (inputs, target) == (f'say {pairs[0][0]}', pairs[0][1])
  # A task that splits windows of a text has no pairs of texts.
  assert read_pairs(config('prefix_lm'), 'validation') is None


def test_a_tokenizers_own_sentinels_are_used(tmp_path):
  # The vocabulary has bytes as letters, an end of text, and two sentinels that
  # count down, as in T5.
  names = [chr(0x100 + i) for i in range(256)]
  vocabulary = {name: i for i, name in enumerate(names)}
  vocabulary |= {
    '</s>': 256,
    '<extra_id_1>': 257,
    '<extra_id_0>': 258,
    '?': 259,
  }
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='?')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  tokenizer.add_special_tokens(['</s>', '<extra_id_0>', '<extra_id_1>'])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  tokenizer = JsonOptions(f'{tmp_path}/tokenizer.json')
  dataset = load(config('span_corruption', target_len=30, tokenizer=tokenizer))
  assert dataset.vocab_size == 260 + 98
  row = dataset.splits['train'][0]
  marks = [t for t in row['targets'] if t > 256 and t != 259]
  assert marks[:4] == [258, 257, 260, 261]
  assert [t for t in row['encoder_tokens'] if t in marks] == marks[:-1]
  assert row['tokens'][0] == dataset.tokenizer.eos_id == 256
