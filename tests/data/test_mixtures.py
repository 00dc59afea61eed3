"""Mixtures of sources, from options to batches."""

import json

import numpy as np
import pytest

from moe_jax import data
from moe_jax.config import read_options, section_of
from moe_jax.data import (
  DataOptions,
  FilesSource,
  InstructionSource,
  MixtureOptions,
  train_batches,
)
from tests.data.own_kinds import Counting


def suite(**tasks):
  return {
    name: InstructionSource(task=task, num_train=30, num_validation=5)
    for name, task in tasks.items()
  }


def options(tmp_path, mixture, **changes):
  changes = {'task': data.Seq2SeqTask(), 'seq_len': 64, **changes}
  return DataOptions(mixture=mixture, cache_dir=str(tmp_path), **changes)


@pytest.mark.parametrize(
  ('rule', 'shares'),
  [
    ({}, [900, 100]),
    ({'cap': 300}, [300, 100]),
    ({'rule': 'temperature'}, [30, 10]),
    ({'rule': 'temperature', 'temperature': 1.0, 'cap': 400}, [400, 100]),
    ({'rule': 'given', 'weights': {'b': 2.5}}, [1, 2.5]),
  ],
)
def test_the_rules_of_weights(rule, shares):
  mixture = MixtureOptions(sources=suite(a='copy', b='add'), **rule)
  weights = mixture.shares({'a': 900, 'b': 100})
  assert weights == pytest.approx(dict(zip('ab', shares)))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rule': 'given', 'weights': {'aa': 1.0}}, "'aa'; did you mean 'a'"),
    ({'rule': 'given', 'weights': {'a': -1.0}}, 'weights.a=-1.0'),
    ({'weights': {'a': 1.0}}, 'weights=.*has no effect unless'),
    ({'held_out': 'ciphers'}, "held_out: .*'ciphers'.*'arithmetic'"),
    ({'held_out': 'a, arithmetic'}, 'leaves no source to learn from'),
    (
      {'rule': 'given', 'weights': {'a': 0.0, 'b': 0.0}},
      r"held_out='' with weights={'a': 0.0, 'b': 0.0} leaves no source",
    ),
    (
      {'rule': 'given', 'weights': {'b': 2.0}, 'held_out': 'arithmetic'},
      r"weights.b=2.0 has no effect, since held_out='arithmetic'",
    ),
  ],
)
def test_wrong_mixtures_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    MixtureOptions(sources=suite(a='copy', b='add'), **changes)


def test_a_mixture_is_read_from_a_config():
  config = section_of(DataOptions)
  config.task.kind = 'seq2seq'
  config.mixture.sources.sums = {'kind': 'instructions', 'task': 'add'}
  config.mixture.sources.rest = {'kind': 'instructions', 'task': 'subtract'}
  config.mixture.held_out = 'rest'
  data_options = read_options(DataOptions, config)
  assert data_options.mixture.learned() == ['sums']
  assert data_options.mixture.cluster('rest') == 'arithmetic'
  assert read_options(DataOptions, section_of(data_options)) == data_options
  config.source.kind = 'django_gettext'
  with pytest.raises(
    ValueError, match=r"source.kind='django_gettext' has no effect"
  ):
    read_options(DataOptions, config)


def test_a_source_of_another_form_is_named():
  sources = {'a': data.PythonStdlibSource()}
  with pytest.raises(ValueError, match=r"mixture.sources.a.kind='python_std"):
    DataOptions(
      mixture=MixtureOptions(sources=sources), task=data.Seq2SeqTask()
    )


@pytest.mark.parametrize('target_len', [0, 16])
def test_pairs_for_both_kinds_of_model(tmp_path, target_len):
  mixture = MixtureOptions(
    sources=suite(a='copy', b='reverse', c='add'),
    rule='given',
    weights={'a': 2.0},
    held_out='c',
    period=3,
  )
  dataset = data.load(options(tmp_path, mixture, target_len=target_len))
  text = dataset.describe()
  assert 'mixture of 2 sources, 70 pairs' in text
  assert 'mixture, by rows in each period of 3:' in text
  assert '\n  a         2: 30 pairs' in text and '(sequences)' in text
  assert '\n  c  held out: 30 pairs' in text
  row = {'a': 1.5, 'b': 2.0, 'c': 50.0, 'c.chance': 25.0, 'mean': 1.75}
  assert dataset.tell(row).splitlines() == [
    '',
    '  arithmetic (held out): c 50, c.chance 25',
    '  sequences: a 1.5, b 2',
    '  mean 1.75',
  ]
  assert dataset.tell({'bleu': 2.0, 'exact': 0.5}) == 'bleu 2, exact 0.5'
  rows = dataset.splits['train']
  assert list(rows.parts) == ['a', 'b'] and list(dataset.parts) == list('abc')
  batch = next(train_batches(rows, batch_size=6, seed=0, start=0))
  assert ('encoder_tokens' in batch) == bool(target_len)
  assert batch['tokens'].shape == (6, target_len or 64)
  assert dataset.counts['train']['pairs'] == 60
  pairs = data.read_pairs(options(tmp_path, mixture), 'validation')
  assert len(list(pairs)) == 10


@pytest.mark.parametrize('target_len', [0, 16])
def test_every_token_has_the_task_of_its_source(tmp_path, target_len):
  # Ids are numbers in the sorted names of all sources, held-out ones too.
  mixture = MixtureOptions(
    sources=suite(c='copy', a='reverse', b='add'), held_out='b', period=4
  )
  data_options = options(tmp_path, mixture, target_len=target_len)
  assert data_options.tasks == ('a', 'b', 'c')
  dataset = data.load(data_options)
  rows = dataset.splits['train']
  batch = next(train_batches(rows, batch_size=4, seed=0, start=0))
  assert batch['task_ids'][:, 0].tolist() == [0, 2, 0, 2]
  again = data.pipeline.batch_dataset(rows, batch_size=4, seed=0)[0]
  np.testing.assert_array_equal(again['task_ids'], batch['task_ids'])
  sides = ['', 'encoder_'] if target_len else ['']
  assert [n for n in batch if 'task' in n] == [f'{s}task_ids' for s in sides]
  for side in sides:
    ids = batch[f'{side}task_ids']
    assert ids.dtype == np.int32 and ids.shape == batch[f'{side}tokens'].shape
    assert (ids == batch['task_ids'][:, :1]).all()
  held_out = dataset.parts['b'].splits['validation'].take(np.array([0]))
  assert (held_out['task_ids'] == 1).all()
  eval_rows = dataset.splits['validation']
  tasks = eval_rows.take(np.arange(len(eval_rows)))['task_ids'][:, 0]
  lengths = [len(part) for part in eval_rows.parts.values()]
  assert tasks.tolist() == [0] * lengths[0] + [2] * lengths[1]


def test_only_answers_are_learned(tmp_path):
  # Every token that counts belongs to an answer or its end, and all answers
  # count once in an epoch.
  mixture = MixtureOptions(sources=suite(a='copy', b='add'), period=2)
  dataset = data.load(options(tmp_path, mixture, seq_len=96))
  rows, tokenizer = dataset.splits['train'], dataset.tokenizer
  batch = rows.take(np.arange(len(rows)))
  learned = batch['targets'][batch['loss_weights'] > 0]
  answers = [
    target
    for source in mixture.sources.values()
    for _, target in source.pairs().pairs('train')
  ]
  ids = np.concatenate(
    [np.append(tokenizer.encode(a), tokenizer.eos_id) for a in answers]
  )
  assert sorted(learned) == sorted(ids)


def test_texts_for_pretraining_share_one_tokenizer(tmp_path):
  sources = {}
  for name, text in (('one', 'abcab ' * 40), ('two', 'xyz. ' * 40)):
    (tmp_path / f'{name}.txt').write_text(text)
    sources[name] = FilesSource(str(tmp_path / f'{name}.txt'))
  mixture = MixtureOptions(
    sources=sources, rule='given', weights={'two': 3.0}, period=4
  )
  data_options = options(
    tmp_path / 'cache',
    mixture,
    task=data.LmTask(),
    tokenizer=data.CharsOptions(),
    seq_len=8,
  )
  for _ in range(2):  # first fresh, then from the cache
    dataset = data.load(data_options)
    assert dataset.vocab_size >= len(set('abc xyz.'))
    rows = dataset.splits['train']
    batch = next(train_batches(rows, batch_size=4, seed=0, start=0))
    texts = [dataset.tokenizer.decode(row) for row in batch['tokens']]
    assert [set(text) <= set('abc ') for text in texts] == [
      False, True, False, False,
    ]  # fmt: skip


def test_the_tokenizer_of_a_mixture_is_fitted_once(tmp_path, monkeypatch):
  def load_tokenizer(**tasks):
    mixture = MixtureOptions(sources=suite(**tasks))
    tokenizer = data.CharsOptions()
    return data.load(options(tmp_path, mixture, tokenizer=tokenizer)).tokenizer

  first = load_tokenizer(a='copy', b='reverse')
  with monkeypatch.context() as patch:
    patch.setattr(data.CharsOptions, 'fit', lambda *_: pytest.fail('again'))
    assert load_tokenizer(a='copy', b='reverse').identity == first.identity
  assert load_tokenizer(a='add', b='reverse').identity != first.identity


def test_a_bad_source_is_named(tmp_path):
  (tmp_path / 'a.jsonl').write_text(json.dumps({'inputs': 'x'}))
  sources = suite(b='copy') | {'a': data.JsonlSource(str(tmp_path / 'a.jsonl'))}
  with pytest.raises(ValueError, match=r'mixture.sources.a: .*a.jsonl, line 1'):
    data.load(options(tmp_path, MixtureOptions(sources=sources)))


class Defective(Counting):
  """A user's source with a mistake in its code."""

  def texts(self, selection=None):
    """Reads no number."""
    return int('three')


def test_a_defect_of_a_users_source_is_no_bad_input(tmp_path):
  mixture = MixtureOptions(sources={'a': Defective(), 'b': Counting()})
  with pytest.raises(ValueError, match=r'^invalid literal'):
    data.load(options(tmp_path, mixture, task=data.LmTask()))


def test_shrunk_keeps_what_is_embedded():
  sources = {**suite(b='copy'), 'a': data.DocstringsSource()}
  large = DataOptions(
    mixture=MixtureOptions(sources=sources, held_out='sequences'),
    task=data.Seq2SeqTask(),
  )
  small = large.shrunk().mixture
  assert small.sources['b'].task == 'copy' and small.learned() == ['a']
  assert small.sources['a'] == data.DocstringsSource()
