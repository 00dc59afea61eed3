"""Tasks on windows of text: spans, prefixes, and UL2's mixture of both.

A window is told by hand, or comes back from its inputs and targets.
"""

import collections
import dataclasses

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import (
  CharsOptions,
  DataOptions,
  JsonOptions,
  PythonStdlibSource,
  load,
)
from moe_jax.data.layouts import DecoderLayout, EncoderDecoderLayout, RowShape
from moe_jax.data.tasks.texts import (
  DENOISERS,
  MODES,
  DenoisedRows,
  PrefixLM,
  SpanCorruption,
  SpanCorruptionTask,
  Ul2Task,
  corrupt,
  mode_name,
  noise_counts,
  noise_mask,
  windows,
)
from moe_jax.data.tokenizers import Bytes

EOS = 9
SENTINELS = tuple(range(100, 150))


def span_task(layout=None, **options):
  layout = layout or EncoderDecoderLayout(64, 48, start_id=EOS)
  return SpanCorruption(layout, SENTINELS, EOS, **options)


# Two spans of the text `10 11 12 13 14 15 16` are removed: 11, and 14 15.
WINDOW = np.arange(10, 17, dtype=np.uint16)
MASK = np.array([0, 1, 0, 0, 1, 1, 0], bool)


def test_each_span_leaves_a_sentinel_and_follows_its_own():
  # As many sentinels as spans are enough.
  inputs, targets = corrupt(WINDOW, MASK, np.array(SENTINELS[:2]))
  assert inputs.tolist() == [10, 100, 12, 13, 101, 16]
  assert targets.tolist() == [100, 11, 101, 14, 15]
  # Spans at both ends.
  inputs, targets = corrupt(WINDOW, ~MASK, np.array(SENTINELS))
  assert inputs.tolist() == [100, 11, 101, 14, 15, 102]
  assert targets.tolist() == [100, 10, 101, 12, 13, 102, 16]


class Chosen(np.random.Generator):
  """A generator of random numbers that returns the draws of its arguments."""

  def __init__(self, *draws):
    super().__init__(np.random.PCG64())
    self.draws = list(draws)

  def choice(self, total, count, replace):
    draw = self.draws.pop(0)
    assert len(draw) == count and not replace and max(draw) < total
    return np.array(draw)


def test_an_example_by_hand():
  # Two spans have 3 of 7 tokens; the cut after the first makes them 1 and 2
  # tokens long. The 4 kept ones lie around them in 3 stretches, of which the
  # outer two may be empty: 6 = 2 + 2 + 2 is 1, 2 and 1.
  counts = noise_counts(np.array([7]), 0.4, 1.5)
  assert [c.tolist() for c in counts] == [[3], [2]]
  draws = [0], [3, 1]
  example = span_task(density=0.4, mean_span=1.5)(WINDOW, Chosen(*draws))
  assert example.inputs.tolist() == [10, 100, 12, 13, 101, 16, EOS]
  assert example.targets.tolist() == [100, 11, 101, 14, 15, 102, EOS]
  # T5's checkpoints expect this form. The window here begins with a mode token
  # and ends with an end of text, which is not corrupted.
  task = span_task(density=0.4, mean_span=1.5, final_sentinel=False, mode_id=77)
  example = task(np.append(WINDOW, EOS), Chosen(*draws))
  assert example.inputs.tolist() == [77, 10, 100, 12, 13, 101, 16, EOS]
  assert example.targets.tolist() == [100, 11, 101, 14, 15, EOS]


def restored_text(inputs, targets, sentinels=SENTINELS):
  """Returns the text with each sentinel replaced by the targets after it."""
  spans, span = {}, None
  for token in targets.tolist():
    if token in sentinels:
      span = spans.setdefault(token, [])
    elif token != EOS:
      span.append(token)
  *inputs, end = inputs.tolist()
  assert end == EOS
  return [t for token in inputs for t in spans.get(token, [token])]


sizes = st.integers(1, 300)
densities = st.floats(0.02, 0.98)
spans = st.floats(1, 40)
seeds = st.integers(0, 2**32)


@settings(max_examples=40, deadline=None)
@given(sizes, densities, spans, seeds)
def test_filling_the_sentinels_gives_the_window_back(n, density, mean, seed):
  window = 1000 + np.random.default_rng(seed).integers(0, 5, n)
  sentinels = tuple(range(2000, 2000 + n + 1))
  task = SpanCorruption(DecoderLayout(9), sentinels, EOS, density, mean)
  example = task(window, np.random.default_rng(seed))
  assert restored_text(*example, sentinels) == window.tolist()
  # The example has exactly the planned lengths.
  lengths = task.lengths(np.array([n]))
  assert len(example.inputs) == lengths.inputs[0]
  assert len(example.targets) == lengths.targets[0]


def test_counts_are_what_was_asked():
  # The paper's example (section 3.3.4) removes 15 % of 500 tokens, in 25 spans
  # of 3.
  noise, spans = noise_counts(np.array([500, 100, 40]), 0.15, 3.0)
  assert noise.tolist() == [75, 15, 6] and spans.tolist() == [25, 5, 2]
  # There are at most as many spans as leave a token between each two.
  noise, spans = noise_counts(np.array([10]), 0.8, 1.0)
  assert noise.tolist() == [8] and spans.tolist() == [3]
  # In T5's pre-training 568 tokens become 512 inputs and 114 targets.
  layout = EncoderDecoderLayout(512, 114, start_id=0)
  task = span_task(layout, final_sentinel=False)
  assert task.window == 568
  lengths = task.lengths(np.array([568]))
  assert (lengths.inputs[0], lengths.targets[0]) == (512, 114)


def test_every_mask_is_equally_likely():
  # Two spans have 3 of 6 tokens. There are 2 ways to cut the noise, and C(4, 2)
  # ways to cut 3 kept tokens into 3 stretches of which the outer may be empty.
  generator = np.random.default_rng(0)
  mask_counts = collections.Counter(
    tuple(noise_mask(6, generator, 0.5, 1.5).tolist()) for _ in range(6000)
  )
  assert len(mask_counts) == 12
  assert min(mask_counts.values()) > 400 and max(mask_counts.values()) < 600


@settings(max_examples=40, deadline=None)
@given(
  st.integers(9, 90),
  st.just(0) | st.integers(6, 90),
  st.floats(0.05, 0.6),
  st.floats(1, 9),
  st.booleans(),
)
def test_the_window_is_the_largest_that_fits(T_enc, T_dec, density, mean, last):
  layout = DecoderLayout(T_enc)
  if T_dec:
    layout = EncoderDecoderLayout(T_enc, T_dec, start_id=EOS)
  sentinels = tuple(range(1000))
  task = SpanCorruption(
    layout, sentinels, EOS, density, mean, final_sentinel=last
  )
  fits = layout.fits(task.lengths(np.arange(1, 400)))
  # Shorter windows fit too, such as the last one of a document.
  assert fits[: task.window].all() and not fits[task.window :].any()


@pytest.mark.parametrize(
  ('task', 'message'),
  [
    (
      span_task(EncoderDecoderLayout(2, 7, 0)),
      'T_enc=2 and T_dec=7 are too short for span corruption',
    ),
    (
      span_task(EncoderDecoderLayout(512, 300, 0), mean_span=1.0),
      'num_sentinels=50 is below the 78 that a window of 511 tokens needs',
    ),
    (
      PrefixLM(EncoderDecoderLayout(1, 9, 0), 0.5, eos_id=3),
      'T_enc=1 and T_dec=9 are too short for a prefix LM',
    ),
  ],
)
def test_what_does_not_fit_is_refused(task, message):
  with pytest.raises(ValueError, match=message):
    _ = task.window


# Windows of a stream follow.


def test_windows_are_even_and_stay_in_their_document():
  # The stream has documents of 10, 4, 1 and 5 tokens; windows are at most 4
  # long.
  starts = np.array([0, 10, 14, 15])
  assert windows(starts, 20, 4).tolist() == [
    [0, 3], [3, 6], [6, 10], [10, 14], [15, 17], [17, 20]
  ]  # fmt: skip


def corpus(lengths=(150, 37, 3, 60, 9, 2, 200), seed=0):
  """Returns a stream of random documents, their starts and their texts."""
  generator = np.random.default_rng(seed)
  texts = [np.append(generator.integers(10, 99, n), EOS) for n in lengths]
  starts = np.cumsum([0, *(len(text) for text in texts[:-1])])
  return np.concatenate(texts).astype(np.uint16), starts, texts


def span_rows(pack=True):
  tokens, starts, _ = corpus()
  layout = EncoderDecoderLayout(32, 18, start_id=EOS)
  task = SpanCorruption(layout, SENTINELS, EOS)
  return DenoisedRows((tokens, starts), task, pack=pack)


def texts_of(batch):
  """Returns the text of each segment of a batch, its sentinels filled in."""
  texts = []
  for b in range(len(batch['tokens'])):
    for segment in range(1, batch['segment_ids'][b].max() + 1):
      in_decoder = batch['segment_ids'][b] == segment
      in_encoder = batch['encoder_segment_ids'][b] == segment
      inputs = batch['encoder_tokens'][b][in_encoder]
      texts.append(restored_text(inputs, batch['targets'][b][in_decoder]))
  return texts


def test_epochs_differ_in_noise_and_have_the_whole_corpus():
  rows = span_rows()
  n = len(rows)
  first, second = (rows.draw(np.arange(n), 5, np.full(n, e)) for e in (0, 1))
  tokens = sorted(t for text in texts_of(first) for t in text)
  assert tokens == sorted(t for t in corpus()[0].tolist() if t != EOS)
  assert texts_of(first) == texts_of(second)
  is_same_row = (first['encoder_tokens'] == second['encoder_tokens']).all(1)
  assert is_same_row.mean() < 0.3
  assert n < len(span_rows(pack=False))


def test_a_document_ends_in_the_targets_of_a_prefix_lm():
  tokens, starts, texts = corpus()
  layout = EncoderDecoderLayout(24, 20, start_id=EOS)
  task = PrefixLM(layout, eos_id=EOS)
  rows = DenoisedRows((tokens, starts), task, pack=False)
  batch = rows.take(np.arange(len(rows)))
  ends = (batch['targets'] == EOS).sum(1)
  assert ends.sum() == len(texts) and ends.max() == 1
  # An end of text, where there is one, is the row's last target.
  for row, end in zip(batch['targets'], ends):
    real = row[row > 0]
    assert (real[-1] == EOS) == end


# Prefixes follow.


def target_lengths(task, n, count=400):
  """Returns the lengths of targets in many draws."""
  window, generator = np.arange(50, 50 + n), np.random.default_rng(0)
  return [len(task(window, generator).targets) for _ in range(count)]


def test_every_split_of_a_decoders_row_is_equally_likely():
  task = PrefixLM(DecoderLayout(9))
  assert task.window == 10
  counts = np.bincount(target_lengths(task, 10, 1800), minlength=10)
  assert counts[0] == 0 and len(counts) == 10
  assert counts[1:].min() > 140 and counts[1:].max() < 260


def test_a_suffix_is_as_long_as_asked_on_average():
  task = PrefixLM(EncoderDecoderLayout(200, 150, 0), density=0.25)
  assert task.window == 200
  lengths = target_lengths(task, 200, 1000)
  assert abs(np.mean(lengths) - 50) < 3
  assert min(lengths) < 5 and max(lengths) > 95


@settings(max_examples=40, deadline=None)
@given(
  st.integers(4, 60),
  st.integers(0, 60),
  st.floats(0.05, 0.95),
  st.booleans(),
  st.booleans(),
  st.integers(0, 2**32),
)
def test_nothing_overflows_and_nothing_is_lost(
  T, T_dec, density, ends, has_mode, seed
):
  layout = EncoderDecoderLayout(T, T_dec, 0) if T_dec else DecoderLayout(T)
  mode_id, eos_id = 7 if has_mode else None, 8 if ends else None
  task = PrefixLM(layout, density, eos_id, mode_id)
  generator = np.random.default_rng(seed)
  for n in range(2, task.window + 1):
    window = generator.integers(10, 99, n)
    lengths = task.lengths(np.array([n]))
    assert layout.fits(lengths).all()
    inputs, targets = task(window, generator)
    assert len(inputs) <= lengths.inputs[0]
    assert len(targets) <= lengths.targets[0]
    assert len(inputs) + len(targets) == lengths.total[0]
    marks = [[7][: int(has_mode)], [8][: int(ends)]]
    text = inputs[has_mode : len(inputs) - ends].tolist()
    assert inputs.tolist() == [*marks[0], *text, *marks[1]]
    assert text + targets.tolist() == window.tolist()
    assert text and len(targets)


# The mixture of UL2 follows.


def ul2_task(denoisers=DENOISERS, shape=RowShape(120, 110)):
  task = Ul2Task(denoisers=tuple(denoisers))
  return task.windows(task.vocabulary(Bytes(), shape), shape)


MODE_IDS = {
  mode: Ul2Task().vocabulary(Bytes(), RowShape(120)).token_id(mode_name(mode))
  for mode in MODES
}


def test_each_denoiser_comes_as_often_as_asked_with_its_mode_and_density():
  task = ul2_task(
    [('R', 4.0, 0.1, 3.0), ('S', 0.0, 0.3, 2.0), ('X', 4.0, 0.5, 1.0)]
  )
  generator = np.random.default_rng(0)
  window = np.full(task.window, 5)
  shares = collections.defaultdict(list)
  for _ in range(1200):
    example = task(window, generator)
    num_learned = (example.targets == 5).mean() * len(example.targets)
    shares[int(example.inputs[0])].append(num_learned / len(window))
  for mode, count, density in (
    ('R', 600, 0.1),
    ('S', 400, 0.3),
    ('X', 200, 0.5),
  ):
    assert abs(len(shares[MODE_IDS[mode]]) - count) < 60
    assert abs(np.mean(shares[MODE_IDS[mode]]) - density) < 0.02
  # The length of a suffix is random, the share of noise of the other denoisers
  # is not.
  assert np.std(shares[MODE_IDS['S']]) > 0.1
  assert np.std(shares[MODE_IDS['R']]) < 1e-9


def test_s_is_a_prefix_and_its_text_in_order():
  task = ul2_task([('R', 3.0, 0.15, 0.0), ('S', 0.0, 0.25, 1.0)])
  inputs, targets = task(np.arange(10, 40), np.random.default_rng(1))
  assert inputs[0] == MODE_IDS['S'] and inputs[-1] == Bytes.eos_id
  assert [*inputs[1:-1], *targets] == list(range(10, 40))
  # In a row of a decoder-only model no end of text stands between prefix and
  # suffix.
  task = ul2_task([('S', 0.0, 0.25, 1.0)], RowShape(50))
  inputs, targets = task(np.arange(10, 40), np.random.default_rng(1))
  assert [*inputs[1:], *targets] == list(range(10, 40))


@pytest.mark.parametrize('shape', [RowShape(40, 30), RowShape(50)])
def test_no_window_overflows_whatever_is_drawn(shape):
  task = ul2_task(shape=shape)
  generator = np.random.default_rng(2)
  for n in range(2, task.window + 1):
    bounds = task.lengths(np.array([n]))
    assert task.layout.fits(bounds).all()
    for _ in range(8):
      example = task(np.arange(n), generator)
      assert len(example.inputs) <= bounds.inputs[0]
      assert len(example.targets) <= bounds.targets[0]
      assert len(example.inputs) + len(example.targets) <= bounds.total[0]


@pytest.mark.parametrize(
  ('denoisers', 'message'),
  [
    ((), 'none of positive weight'),
    ((('R', 3.0, 0.15, 0.0),), 'none of positive weight'),
    ((('T', 3.0, 0.15, 1.0),), r"'T'; have \['R', 'S', 'X'\]"),
    ((('R', 3.0, 0.15, -1.0),), 'weight=-1.0 must be at least 0'),
    ((('R', 3.0, 1.0, 1.0),), r'density=1.0 not in \(0, 1\)'),
    ((('R', 0.0, 0.5, 1.0),), 'mean span=0.0 must be at least 1'),
  ],
)
def test_wrong_mixtures_are_refused(denoisers, message):
  with pytest.raises(ValueError, match=message):
    Ul2Task(denoisers=denoisers)


# The tests below make rows from options.


def test_a_tokenizers_own_sentinels_are_used(tmp_path):
  # The vocabulary has bytes as letters, an end of text, and two sentinels that
  # count down, as in T5.
  names = [chr(0x100 + i) for i in range(256)]
  names += ['</s>', '<extra_id_1>', '<extra_id_0>', '?']
  vocabulary = {name: i for i, name in enumerate(names)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='?')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  tokenizer.add_special_tokens(['</s>', '<extra_id_0>', '<extra_id_1>'])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  task = SpanCorruptionTask(
    noise_density=0.3, mean_noise_span=2.0, final_sentinel=False
  )
  options = DataOptions(
    source=PythonStdlibSource('email,json'), task=task,
    seq_len=60, target_len=30, pack=False,
    tokenizer=JsonOptions(f'{tmp_path}/tokenizer.json'),
  )  # fmt: skip
  dataset = load(options)
  assert dataset.vocab_size == 260 + 98
  row = dataset.splits['train'][0]
  assert row['tokens'][0] == dataset.tokenizer.eos_id == 256
  targets = row['targets'][row['segment_ids'] > 0].tolist()
  inputs = row['encoder_tokens'][row['encoder_segment_ids'] > 0].tolist()
  marks = [t for t in targets if t > 256 and t != 259]
  assert marks[:4] == [258, 257, 260, 261] and targets[-1] == 256
  assert [t for t in inputs if t in marks] == marks  # and no final one
  # Both sides have the marks and an end.
  noise, rest = (len(s) - len(marks) - 1 for s in (targets, inputs))
  assert noise == round(0.3 * (noise + rest)) and len(marks) == round(noise / 2)
  # Characters get an end of text, after which come the sentinels.
  options = dataclasses.replace(
    options, tokenizer=CharsOptions(), cache_dir=str(tmp_path)
  )
  dataset = load(options)
  eos = dataset.tokenizer.eos_id
  assert eos == dataset.vocab_size - 101
  assert eos in dataset.splits['train'][0]['targets']
