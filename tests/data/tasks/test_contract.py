"""Every task keeps its contract: ours, and a user's own.

Rows are judged by definition, token by token; batches by the same rows, drawn
alone, in another order or by another process.
"""

import functools

import numpy as np
import pytest

from moe_jax.data import (
  TASKS,
  DataOptions,
  GettextSource,
  PythonStdlibSource,
  batch_dataset,
  eval_batches,
  load,
)

OWN = 'tests.data.own_kinds:Backwards'
DECODER = {'tokens', 'targets', 'segment_ids', 'positions', 'loss_weights'}
ENCODER = {'encoder_tokens', 'encoder_segment_ids', 'encoder_positions'}
CASES = [
  (kind, target_len)
  for kind in [*TASKS.builtin, OWN]
  for target_len in (0, 50)[: 1 + TASKS.get(kind).makes_examples]
]
each = pytest.mark.parametrize(('kind', 'target_len'), CASES)
# The vocabulary has 256 bytes and an end of text, and for some tasks 100
# sentinels and 3 modes.
ADDED = {'span_corruption': 100, 'ul2': 103}


@functools.cache
def dataset_of(kind, target_len=0):
  task = TASKS.get(kind)()
  source = PythonStdlibSource('email,json')
  if task.reads == 'pairs':
    source = GettextSource('de,fr')
  options = DataOptions(
    source=source, task=task, seq_len=60, target_len=target_len
  )
  return load(options)


def assert_equal(batch, expected):
  assert batch.keys() == expected.keys()
  for name in batch:
    np.testing.assert_array_equal(batch[name], expected[name], name)


def assert_segments(segments, positions):
  """Segments are numbered one after another; positions count within each."""
  for row, places in zip(segments.tolist(), positions.tolist()):
    real = [s for s in row if s]
    assert row == [*real, *[0] * (len(row) - len(real))]
    assert real == sorted(real) and {*real} == {*range(1, max(real) + 1)}
    counts = [real[:t].count(s) for t, s in enumerate(real)]
    assert places == [*counts, *[0] * (len(row) - len(real))]


@each
def test_rows_have_whole_segments_and_a_loss_where_it_belongs(kind, target_len):
  dataset = dataset_of(kind, target_len)
  V = dataset.vocab_size
  assert 257 + ADDED.get(kind, 0) == V
  batch = batch_dataset(dataset.splits['train'], batch_size=5, seed=0)[3]
  assert batch.keys() == (DECODER | ENCODER if target_len else DECODER)
  for name, values in batch.items():
    T = target_len if target_len and name in DECODER else 60
    assert values.shape == (5, T)
    assert values.dtype == (np.float32 if name == 'loss_weights' else np.int32)
    if name.endswith(('tokens', 'targets')):
      assert values.min() >= 0 and values.max() < V
  segments, positions = batch['segment_ids'], batch['positions']
  real, weights = segments > 0, batch['loss_weights']
  assert_segments(segments, positions)
  for name in ('tokens', 'targets', 'loss_weights'):
    assert not batch[name][~real].any()
  assert set(np.unique(weights)) <= {0, 1}
  # In a segment each token is the target of the one before it.
  starts = real & (positions == 0)
  inside = real[:, 1:] & ~starts[:, 1:]
  np.testing.assert_array_equal(
    batch['tokens'][:, 1:][inside], batch['targets'][:, :-1][inside]
  )
  if target_len:
    # All targets have a loss; a start token begins each of the segments, which
    # are those of the encoder.
    assert (weights == real).all()
    assert (batch['tokens'][starts] == dataset.tokenizer.start_id).all()
    encoder = batch['encoder_segment_ids']
    assert_segments(encoder, batch['encoder_positions'])
    assert (encoder.max(1) == segments.max(1)).all()
    assert not batch['encoder_tokens'][encoder == 0].any()
  elif dataset.task.makes_examples:
    # The loss covers each segment from some token, its answer's, to its end.
    assert (np.diff(weights, axis=1)[inside] >= 0).all()
    assert 0.05 < weights.sum() / real.sum() < 0.95
  else:
    last = np.append(~inside, np.ones((5, 1), bool), axis=1)
    np.testing.assert_array_equal(weights[~last], 1)


@each
def test_a_batch_follows_from_its_number_and_the_seed(kind, target_len):
  rows = dataset_of(kind, target_len).splits['train']
  whole = batch_dataset(rows, batch_size=6, seed=3)
  other = batch_dataset(rows, batch_size=6, seed=4)
  parts = [(share, batch_dataset(rows, batch_size=6, seed=3, share=share))
           for share in (np.array([0, 1, 2]), np.array([4, 5, 1]))]  # fmt: skip
  # Batches are asked for in any order, one of a later epoch among them.
  for i in (7, 0, 10 * len(rows)):
    assert (whole[i]['tokens'] != other[i]['tokens']).any()
    for share, part in parts:
      assert_equal(part[i], {k: v[share] for k, v in whole[i].items()})


@each
def test_an_evaluation_has_every_row_once(kind, target_len):
  rows = dataset_of(kind, target_len).splits['validation']
  n = min(len(rows), 40)
  every = rows.take(np.arange(len(rows)))
  batches = list(eval_batches(rows, batch_size=7))
  for name, values in every.items():
    joined = np.concatenate([batch[name] for batch in batches])
    np.testing.assert_array_equal(joined[: len(rows)], values)
    assert not joined[len(rows) :].any()  # beyond the last is padding
  share = np.array([2, 5])
  parts = eval_batches(rows, batch_size=7, share=share)
  for batch, part in zip(batches, parts, strict=True):
    assert_equal(part, {k: v[share] for k, v in batch.items()})
  for i in (0, n - 1, -1):
    assert_equal(rows[i], {k: v[i] for k, v in every.items()})
  assert every['loss_weights'].any(1).all()


@pytest.mark.parametrize('kind', TASKS.builtin)
def test_an_end_parts_inputs_from_answers_unless_they_go_on(kind):
  task = TASKS.get(kind)
  assert task.generates == (kind in ('prefix_lm', 'seq2seq'))
  assert task.answers_go_on == (kind in ('lm', 'prefix_lm'))
  dataset = dataset_of(kind)
  row = dataset.splits['train'][0]
  tokens = row['tokens'][row['segment_ids'] == 1]
  assert (dataset.tokenizer.eos_id in tokens) == (not task.answers_go_on)


def test_tasks_on_a_text_share_its_tokens():
  digests = {dataset_of(*case).digest for case in CASES if case[0] != 'seq2seq'}
  assert len(digests) == 1
  text = dataset_of('span_corruption', 50).describe()
  assert '\ntask: span_corruption\n' in text and 'V=357' in text
  assert 'rows of T_enc=60 and T_dec=50, padding ' in text
