"""A run that replays a trace ends as the recorded one; others are refused."""

import dataclasses
import itertools
import re
import types

import jax
import numpy as np
import pytest

from moe_jax import run_config
from moe_jax.analysis import traces
from moe_jax.analysis.recording import Traces, header_of
from moe_jax.analysis.replay import Replaying
from moe_jax.analysis.traces import Record
from moe_jax.config import OptionError
from moe_jax.models.base import REPLAYED
from moe_jax.runs import metrics
from moe_jax.training.loop import train_and_evaluate
from moe_jax.training.setup import set_up
from tests.analysis.random_choices import random_choices
from tests.training import tiny
from tests.training.conftest import _equal_runs_share_programs  # noqa: F401
from tests.training.hooks import SigtermAt

TIGHT = {'kind': 'per_token', 'per_token': {'factor': 1.0}}
# Half of the choices are dropped, and the router has noise.
MOE = {
  'num_selected': 2,
  'capacity': TIGHT,
  'router': {'token_choice': {'gates': 'renormalized', 'jitter': 0.1}},
}
SUMS = types.SimpleNamespace(_replace=lambda choices: choices)
PLAIN = {'sample': {'num_tokens': 0}, 'batch_size': 8}


def config(trace='', moe=(), record=False, **overrides):
  """The config of a run that replays a trace, or that is recorded."""
  moe = {**MOE, **dict(moe), 'replay': str(trace)}
  trace_overrides = {'trace': {'every_steps': 1}} if record else {}
  return tiny.config(
    **{**PLAIN, 'model': {'moe': moe}, **trace_overrides, **overrides}
  )


def train(folder, *hooks, devices=1, **overrides):
  return train_and_evaluate(
    run_config.read(config(**overrides)),
    folder,
    hooks=[Replaying(), Traces(), *hooks],
    devices=jax.devices()[:devices],
  )


def rows(folder):
  """The metrics of a run without its times."""
  lines = metrics.read_metrics(folder / metrics.FILE_NAME)
  times = re.compile(
    r'train/(tokens_per_second|.*_seconds|goodput|lost_to_\w+|time)'
  )
  return [{k: v for k, v in r.items() if not times.fullmatch(k)} for r in lines]


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
  """The folder of a recorded run, and its last state."""
  folder = tmp_path_factory.mktemp('recorded')
  return folder, train(folder, record=True)


@pytest.mark.slow
def test_a_replayed_run_is_the_recorded_one_bit_for_bit(recorded, tmp_path):
  folder, state = recorded
  trace = folder / 'trace'
  replayed_state = train(tmp_path / 'whole', trace=trace, record=True)
  assert_equal(replayed_state, state)
  assert rows(tmp_path / 'whole') == rows(folder)
  # A run that is stopped goes on in the record of its step.
  stopped = train(tmp_path / 'parts', SigtermAt(3), trace=trace, record=True)
  assert int(stopped.step) == 3
  assert_equal(train(tmp_path / 'parts', trace=trace, record=True), state)
  # A replayed run records the choices that it replays.
  folders = trace, tmp_path / 'whole' / 'trace'
  for a, b in zip(*(traces.read(f).records() for f in folders), strict=True):
    assert not a.layers[1].kept.all()
    assert_equal(a.layers[1], b.layers[1])


@pytest.mark.slow
def test_devices_and_microbatches_replay_the_same_choices(recorded, tmp_path):
  folder, _ = recorded
  mesh = dict(mesh={'data': 2, 'expert': 2}, microbatches=2, devices=4)
  bare = dict(evals={}, checkpoint={'keep_best': False})
  still = {'router': {'token_choice': {'gates': 'renormalized', 'jitter': 0.0}}}
  train(tmp_path, trace=folder / 'trace', moe=still, **mesh, **bare)
  for new_row, recorded_row in zip(rows(tmp_path), rows(folder), strict=True):
    for name in ('load', 'drop_rate', 'kept_load'):
      name = f'train/layer_1/{name}'
      assert new_row.get(name) == recorded_row.get(name)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run that is set up, for its batches and its header."""
  options = run_config.read(config(total_steps=3))
  folder = tmp_path_factory.mktemp('run')
  return set_up(options, folder, devices=jax.devices()[:1])


def test_batches_get_the_records_of_their_steps_alone(run, tmp_path):
  rng, header, records = np.random.default_rng(0), header_of(run), []
  for step, batch in enumerate(itertools.islice(run.batches(0), 3)):
    ids = [np.array(batch[k]) for k in ('tokens', 'positions', 'segment_ids')]
    choices = random_choices(rng, header.layers[1], ids[2] > 0)
    records.append(Record('train', step, 0, *ids, {1: choices}))
  records[2].tokens[-1, -1] ^= 1  # another token than the batch has
  traces.write(tmp_path / 'trace', header, records)
  # The step, which is another one, takes down its batches.
  batches = []
  metrics = types.SimpleNamespace(sums=SUMS, _replace=lambda sums: sums)
  options = run_config.read(config(tmp_path / 'trace', total_steps=3))
  new_run = dataclasses.replace(
    set_up(options, tmp_path / 'new', devices=jax.devices()[:1]),
    train_step=lambda state, batch: (batches.append(batch), metrics),
  )
  hook = Replaying()
  hook.check(new_run)
  new_run = hook.start(new_run)
  state = new_run.programs.abstract_state.replace(step=1)
  with pytest.raises(ValueError, match='after 2 steps is another one'):
    for batch in new_run.batches(1):
      new_run.train_step(state, batch)
  (batch,) = batches
  layer = records[1].layers[1]
  for key, expected in zip(REPLAYED, (layer.expert, layer.kept), strict=True):
    np.testing.assert_array_equal(batch[key], expected[:, :, None])


def test_a_foreign_trace_is_refused_with_all_that_differs(run, tmp_path):
  header = header_of(run)
  foreign_layer = dataclasses.replace(
    header.layers[1], num_experts=8, num_selected=1, group_size=4, capacity=99
  )
  header = dataclasses.replace(
    header, layers={1: foreign_layer, 3: foreign_layer}, seq_len=10, seed=7
  )
  traces.write(tmp_path / 'trace', header, [])
  with pytest.raises(ValueError, match='does not fit') as error:
    train(tmp_path / 'new', trace=tmp_path / 'trace')
  lines = str(error.value).split('\n')
  assert [line.split(': ')[:-1][-1] for line in lines[1:-1]] == [
    'seq_len', 'seed', 'sparse layers',
    'num_experts', 'num_selected', 'group_size', 'capacity',
  ]  # fmt: skip
  assert lines[-1].startswith('6 of 6 steps have no record')
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'moe': {'force_balance': 'random'}}, "force_balance='random' with repla"),
    ({'distill': {'teacher': 'x'}}, 'would be given the same choices'),
  ],
)
def test_what_cannot_be_replayed_is_refused(overrides, message):
  with pytest.raises(OptionError, match=message):
    run_config.read(config('t', **overrides))
