"""Traces are read as they were written, or refused with what differs."""

import dataclasses

import numpy as np
import pytest

from moe_jax.analysis import traces
from moe_jax.analysis.traces import Header, LayerChoices, LayerInfo, Record

B, T, E, K = 3, 5, 7, 2
LAYERS = {1: LayerInfo(E, K, 4, T), 4: LayerInfo(300, 1, by_expert=True)}
HEADER = Header(LAYERS, B, T, 40_000, sources=('a', 'b'), has_logits=True)


def make(step=0, kind='train', batch=0, seed=0, **changes):
  """A record of random choices; the last token of each row is padding."""
  rng = np.random.default_rng([seed, step, batch])
  documents = np.ones((B, T), np.int32)
  documents[:, -1] = 0
  expert = rng.integers(0, E, (B, T, K)).astype(np.int32)
  expert[:, -1] = -1
  kept = (rng.random((B, T, K)) < 0.8) & (expert >= 0)
  gate = np.where(kept, rng.random((B, T, K)), 0).astype(np.float32)
  logits = rng.normal(size=(B, T, E)).astype(np.float32)
  # Experts 299 and 6 take tokens 0 and 2 of row 1; no other token is taken.
  chosen = np.full((B, T, 2), -1, np.int32)
  chosen[1, 0, 0] = 299
  chosen[1, 2] = 6, 299
  layers = {
    1: LayerChoices(expert, gate, kept, logits),
    4: LayerChoices(chosen, np.where(chosen >= 0, 0.25, 0.0), chosen >= 0),
  }
  tokens, positions = rng.integers(0, 40_000, (B, T)), np.tile(range(T), (B, 1))
  ids = tokens, positions, documents
  sources = rng.integers(0, 2, (B, T))
  record = Record(kind, step, batch, *ids, layers, sources)
  return record._replace(**changes)


def assert_equal(read, written):
  for name in ('kind', 'step', 'batch', 'sequence'):
    assert getattr(read, name) == getattr(written, name)
  for name in ('tokens', 'positions', 'documents', 'sources'):
    np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert getattr(read, name).dtype == np.int32
  choices, expected = read.layers[1], written.layers[1]
  np.testing.assert_array_equal(choices.expert, expected.expert)
  np.testing.assert_array_equal(choices.kept, expected.kept)
  np.testing.assert_array_equal(choices.gate, np.float16(expected.gate))
  np.testing.assert_array_equal(choices.logits, np.float16(expected.logits))
  for a, b in zip(read.layers[4][:3], written.layers[4][:3], strict=True):
    np.testing.assert_array_equal(a, b)


def test_records_are_read_as_written(tmp_path):
  records = [make(0), make(1), *(make(1, 'validation', i) for i in range(2))]
  traces.write(tmp_path / 'trace', HEADER, records)
  trace = traces.read(tmp_path / 'trace')
  assert trace.header == HEADER
  assert trace.kinds == ('train', 'validation')
  assert trace.steps_of('train') == (0, 1)
  assert trace.steps_of('validation') == (1,)
  for read, written in zip(trace.records(), records, strict=True):
    assert_equal(read, written)
  assert [r.step for r in trace.records('train', range(1, 9))] == [1]
  with pytest.raises(ValueError, match='is there already'):
    traces.write(tmp_path / 'trace', HEADER, records)


def test_three_lines_of_numpy_read_it(tmp_path):
  traces.write(tmp_path, HEADER, [make(3, 'valid', 2, sequence='encoder')])
  arrays = np.load(tmp_path / 'valid/00000003_00002_encoder.npz')
  expert = arrays['expert_1']
  load = np.bincount(expert[expert >= 0], minlength=E)
  assert load.sum() == 2 * B * (T - 1) and expert.dtype == np.int8
  assert arrays['expert_4'].dtype == np.int16
  assert arrays['gate_1'].dtype == np.float16
  names = 'expert', 'gate', 'kept'
  assert {*arrays} == {
    *('tokens', 'positions', 'documents', 'sources', 'logits_1'),
    *(f'{name}_{layer}' for name in names for layer in (1, 4)),
  }


def test_a_run_that_goes_on_replaces_its_later_steps(tmp_path):
  # A run took steps 0 to 3, and was killed. It goes on from the checkpoint of
  # step 2, takes step 2 anew and is killed, too.
  steps = [make(step, seed=1) for step in range(4)]
  evaluations = [make(step, 'validation', seed=1) for step in (2, 3)]
  traces.write(tmp_path, HEADER, [*steps, *evaluations])
  traces.begin(tmp_path, HEADER, 2)
  traces.save(tmp_path, HEADER, make(2, seed=2))
  records = [*traces.read(tmp_path).records()]
  # Evaluations before the checkpoint stay.
  expected = [(0, 'train'), (1, 'train'), (2, 'train'), (2, 'validation')]
  assert [(r.step, r.kind) for r in records] == expected
  for record, seed in zip(records, (1, 1, 2, 1), strict=True):
    tokens = make(record.step, seed=seed).tokens
    np.testing.assert_array_equal(record.tokens, tokens)


@pytest.mark.parametrize(
  'damage',
  [
    lambda b: b[: (i := b.index(b'NUMPY') + 130)] + b'!' + b[i + 1 :],
    lambda b: b[:-9],
  ],
  ids=['damaged', 'truncated'],
)
def test_a_bad_file_is_refused(tmp_path, damage):
  traces.write(tmp_path, HEADER, map(make, range(3)))
  path = sorted(tmp_path.glob('train/*.npz'))[1]
  unfinished = path.with_suffix('.tmp')  # it is ignored
  unfinished.write_bytes(path.read_bytes()[:100])
  assert len([*traces.read(tmp_path).records()]) == 3
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=r'00000001_00000\.npz cannot be read'):
    list(traces.read(tmp_path).records())


def test_another_trace_is_refused_with_what_differs(tmp_path):
  traces.write(tmp_path, HEADER, [])
  header = dataclasses.replace(HEADER, seed=8, data_digest='abc', note='told')
  with pytest.raises(ValueError, match='abc') as error:
    traces.check(tmp_path, header)
  assert 'seed: 0 there, 8 here' in str(error.value)
  assert 'note' not in str(error.value)


def test_a_trace_of_another_format_is_refused(tmp_path):
  (tmp_path / 'header.json').write_text('{"format": 1}')
  with pytest.raises(ValueError, match='a trace of format 1; this version'):
    traces.read(tmp_path)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'positions': np.zeros((B, 4), int)}, r'positions has shape \(3, 4\)'),
    ({'layers': {2: make().layers[1]}}, r'layer 2 not in \[1, 4\]'),
    ({'layers': {1: make().layers[4]}}, 'expert 299 not below 7'),
  ],
)
def test_a_record_that_does_not_fit_is_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    traces.write(tmp_path, HEADER, [make(**changes)])
