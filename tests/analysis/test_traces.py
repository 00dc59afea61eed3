"""Traces are read as they were written, or refused with what differs."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.analysis import traces
from moe_jax.analysis.traces import (
  Header,
  LayerChoices,
  LayerInfo,
  Record,
  Writer,
)

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
  chosen = np.full((B, T, 300), -1, np.int32)
  chosen[1, 0, 299] = 299
  chosen[1, 2, [6, 299]] = 6, 299
  layers = {
    1: LayerChoices(expert, gate, kept, logits),
    4: LayerChoices(chosen, np.where(chosen >= 0, 0.25, 0.0), chosen >= 0),
  }
  record = Record(
    kind,
    step,
    batch,
    rng.integers(0, 40_000, (B, T)),
    np.tile(np.arange(T), (B, 1)),
    documents,
    layers,
    rng.integers(0, 2, (B, T)),
  )
  return record._replace(**changes)


def rows_of(record, rows):
  """The record of some rows."""
  fields = {
    name: getattr(record, name)[rows]
    for name in ('tokens', 'positions', 'documents', 'sources')
  }
  layers = {
    i: LayerChoices(*(None if x is None else x[rows] for x in choices))
    for i, choices in record.layers.items()
  }
  return record._replace(layers=layers, **fields)


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
  # If experts choose, the choices that exist are moved to the front.
  choices = read.layers[4]
  assert choices.expert.shape == (B, T, 2)
  assert choices.expert[1, 0].tolist() == [299, -1]
  assert choices.expert[1, 2].tolist() == [6, 299]
  assert choices.kept.sum() == (choices.expert >= 0).sum() == 3
  assert choices.gate[1, 2].tolist() == [0.25, 0.25]


def test_records_are_read_as_written(tmp_path):
  records = [
    make(0),
    make(1),
    make(1, 'validation', 0),
    make(1, 'validation', 1),
  ]
  traces.write(tmp_path / 'trace', HEADER, records)
  trace = traces.read(tmp_path / 'trace')
  assert trace.header == HEADER
  assert trace.kinds == ('train', 'validation')
  assert trace.steps == (0, 1) and trace.steps_of('validation') == (1,)
  for read, written in zip(trace.records(), records, strict=True):
    assert_equal(read, written)
  assert [r.step for r in trace.records('train', range(1, 9))] == [1]
  with pytest.raises(ValueError, match=r"unknown kind 'valid'; have \['train'"):
    next(trace.records('valid'))
  with pytest.raises(ValueError, match='has a trace already'):
    traces.write(tmp_path / 'trace', HEADER, records)


def test_a_record_that_is_there_twice_is_refused(tmp_path):
  with Writer(tmp_path, HEADER) as writer:
    writer.add(make(3))
    writer.add(make(3))
  with pytest.raises(ValueError, match="batch 0 of 'train' at step 3 twice"):
    traces.read(tmp_path)


def test_float32_loses_nothing(tmp_path):
  header = dataclasses.replace(HEADER, dtype='float32')
  traces.write(tmp_path, header, [make()])
  (record,) = traces.read(tmp_path).records()
  for name in ('gate', 'logits'):
    np.testing.assert_array_equal(
      getattr(record.layers[1], name), getattr(make().layers[1], name)
    )


def test_rows_of_two_processes_are_joined(tmp_path):
  whole_record, rows_by_process = make(3), ([0, 2], [1])
  for process, rows in enumerate(rows_by_process):
    with Writer(tmp_path, HEADER, process=process, session=1) as writer:
      writer.add(rows_of(whole_record, rows), rows, B)
      if process == 0:  # process 1 was killed before it wrote this one
        writer.add(rows_of(make(4), rows), rows, B)
  trace = traces.read(tmp_path)
  (record,) = trace.records()
  assert_equal(record, whole_record)
  assert trace.incomplete == 1


def test_a_run_that_goes_on_replaces_its_later_steps(tmp_path):
  # The first session took steps 0 to 3, and was killed. The second went on from
  # the checkpoint of step 2, took step 2 and was killed, too.
  with Writer(tmp_path, HEADER, chunk_bytes=1) as writer:
    for step in range(4):
      writer.add(make(step, seed=1))
    writer.add(make(2, 'validation', seed=1))
    writer.add(make(3, 'validation', seed=1))
  with Writer(tmp_path, HEADER, start=2) as writer:
    writer.add(make(2, seed=2))
  trace = traces.read(tmp_path)
  # Evaluations before the checkpoint stay.
  for record, seed in zip(trace.records(), (1, 1, 2, 1), strict=True):
    expected = make(record.step, record.kind, seed=seed)
    np.testing.assert_array_equal(record.tokens, expected.tokens)
  assert [r.step for r in trace.records('train')] == [0, 1, 2]
  assert [r.step for r in trace.records('validation')] == [2]


def chunks(folder):
  return sorted(folder.glob('*.safetensors'))


@pytest.fixture
def three_chunks(tmp_path):
  with Writer(tmp_path, HEADER, chunk_bytes=1) as writer:
    for step in range(3):
      writer.add(make(step))
  assert len(chunks(tmp_path)) == 3
  return tmp_path


def test_an_unfinished_chunk_is_ignored(three_chunks):
  first, *_, last = chunks(three_chunks)
  last.with_name(last.name + '.tmp').write_bytes(first.read_bytes()[:100])
  assert traces.read(three_chunks).steps == (0, 1, 2)


@pytest.mark.parametrize(
  ('name', 'damage', 'message'),
  [
    ('damaged', lambda b: b[:-1] + bytes([b[-1] ^ 1]), 'damaged: its sha256'),
    ('truncated', lambda b: b[:-9], 'cannot be read'),
    ('no trace', lambda b: b'nothing', 'cannot be read'),
  ],
)
def test_a_bad_chunk_is_refused(three_chunks, name, damage, message):
  path = chunks(three_chunks)[1]
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=f'part_00000001.*{message}'):
    list(traces.read(three_chunks).records())


def test_a_missing_chunk_is_refused(three_chunks):
  chunks(three_chunks)[1].unlink()
  with pytest.raises(ValueError, match=r'process 0 has parts \[0, 2\] alone'):
    traces.read(three_chunks)


def test_another_trace_is_refused_with_what_differs(three_chunks, tmp_path):
  header = dataclasses.replace(HEADER, seed=8, data_digest='abc', note='told')
  message = r"data_digest: '' here, 'abc' there\n  seed: 0 here, 8 there"
  with pytest.raises(ValueError, match='abc') as error:
    Writer(three_chunks, header)
  assert 'seed: 8 here, 0 there' in str(error.value)
  assert 'note' not in str(error.value)
  traces.write(tmp_path / 'other', header, [make()])
  (chunk,) = chunks(tmp_path / 'other')
  chunk.rename(three_chunks / chunk.name.replace('session_00001', 'session_2'))
  with pytest.raises(ValueError, match=message):
    traces.read(three_chunks)


def test_a_folder_without_a_trace_is_refused(tmp_path):
  with pytest.raises(ValueError, match='has no trace'):
    traces.read(tmp_path)
  (tmp_path / 'header.json').write_text('{"format": 99}')
  with pytest.raises(ValueError, match='a trace of format 99'):
    traces.read(tmp_path)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'positions': np.zeros((B, 4), int)}, r'positions has shape \(3, 4\)'),
    ({'layers': {2: make().layers[1]}}, r'layer 2 not in \[1, 4\]'),
    (
      {'layers': {1: make().layers[4]}},
      'expert 299 not below 7',
    ),
  ],
)
def test_a_record_that_does_not_fit_is_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    Writer(tmp_path, HEADER).add(make(**changes))


def test_bytes_of_a_choice(tmp_path):
  # A fiftieth of 1,000 steps of 12 layers, E=64, K=2 and 2,048 tokens.
  rng = np.random.default_rng(0)
  header = Header({i: LayerInfo(64, 2) for i in range(12)}, 4, 512, 32_000)

  def random_record(step):
    shape = 4, 512, 2
    layers = {
      i: LayerChoices(
        rng.integers(0, 64, shape), rng.random(shape), rng.random(shape) < 0.9
      )
      for i in range(12)
    }
    ids = rng.integers(0, 32_000, shape[:2])
    positions = np.tile(np.arange(512), (4, 1))
    return Record('train', step, 0, ids, positions, np.ones((4, 512)), layers)

  traces.write(tmp_path, header, map(random_record, range(20)))
  size = sum(path.stat().st_size for path in tmp_path.iterdir())
  assert size * 50 < 200e6
  assert len(traces.read(tmp_path)) == 20


KILLED = """
import itertools, sys
from tests.analysis.test_traces import HEADER, Writer, make
writer = Writer(sys.argv[1], HEADER, chunk_bytes=10_000)
for step in itertools.count():
  writer.add(make(step))
  print(step, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_chunks(tmp_path):
  root = pathlib.Path(__file__).parents[2]
  process = subprocess.Popen(
    [sys.executable, '-c', KILLED, tmp_path],
    cwd=root,
    stdout=subprocess.PIPE,
    text=True,
  )
  for line in process.stdout:
    if int(line) == 500:
      os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert process.returncode == -signal.SIGKILL
  trace = traces.read(tmp_path)
  steps = trace.steps
  assert len(steps) > 400 and steps == tuple(range(len(steps)))
  for record in trace.records(steps=range(0, 500, 50)):
    assert_equal(record, make(record.step))
