"""The choices that a run records are those that its routers made."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from moe_jax import generate
from moe_jax.analysis import record_evaluation, traces
from moe_jax.analysis.recording import Traces, records_of
from moe_jax.config import OptionError
from moe_jax.configs import base
from moe_jax.models.recorded import recording
from moe_jax.training.loop import train_and_evaluate
from moe_jax.training.run_options import TraceOptions
from moe_jax.training.setup import Hook, set_up
from tests.training import tiny
from tests.training.conftest import _equal_runs_share_programs  # noqa: F401

NO_SAMPLE = {'num_tokens': 0}
EVERY_STEP = {'every_steps': 1, 'logits': True, 'dtype': 'float32'}


def first_step(folder, devices, **overrides):
  """The run, the variables that begin it, and the record of its first step."""
  options = tiny.options(trace=EVERY_STEP, sample=NO_SAMPLE, **overrides)
  run = set_up(options, folder, devices=jax.devices()[:devices])
  state, hook = run.programs.init_state(), Traces()
  variables = jax.tree.map(np.asarray, run.programs.variables(state))
  hook.check(run)
  run = hook.start(run)
  batch = next(run.batches(0))
  host_batch = {name: np.asarray(values) for name, values in batch.items()}
  _, metrics = run.train_step(state, batch)
  assert metrics.sums.choices is None
  hook.close()
  (record,) = traces.read(folder / 'trace').records()
  assert (record.kind, record.step, record.batch) == ('train', 0, 0)
  for name, key in (('tokens', 'tokens'), ('documents', 'segment_ids')):
    np.testing.assert_array_equal(getattr(record, name), host_batch[key])
  np.testing.assert_array_equal(record.positions, host_batch['positions'])
  return run, variables, host_batch, record


def served_in_order(expert, capacity):
  """Marks choices of a group that find a slot, bool [S, K], in a plain loop."""
  loads, is_kept = {}, np.zeros(expert.shape, bool)
  for index in np.ndindex(*expert.shape):
    if (e := expert[index]) >= 0:
      is_kept[index] = loads.get(e, 0) < capacity
      loads[e] = loads.get(e, 0) + 1
  return is_kept


def check_tokens_choose(run, variables, batch, record):
  """Choices, drops and gates equal those of a forward pass and of a loop."""
  _, made = recording(run.model, variables, **run.model.inputs(batch))
  (expected,) = records_of(
    run.model, 'train', 0, 0, batch, jax.tree.map(np.asarray, made)
  )
  header = traces.read(run.workdir / 'trace').header
  assert list(record.layers) == list(run.model.stacks.sparse_layers)
  for layer, routing in record.layers.items():
    K, S = header.layers[layer].num_selected, header.layers[layer].group_size
    assert routing.expert.shape == (*batch['tokens'].shape, K)
    real = batch['segment_ids'] > 0
    assert (routing.expert[~real] == -1).all() and (
      routing.expert[real] >= 0
    ).all()
    np.testing.assert_array_equal(routing.expert, expected.layers[layer].expert)
    groups = routing.expert.reshape(-1, S, K)
    is_kept = [
      served_in_order(g, header.layers[layer].capacity) for g in groups
    ]
    np.testing.assert_array_equal(
      routing.kept[real], np.reshape(is_kept, (*real.shape, K))[real]
    )
    shifted = np.exp(routing.logits - routing.logits.max(-1, keepdims=True))
    probs = shifted / shifted.sum(-1, keepdims=True)
    gate = np.take_along_axis(probs, np.maximum(routing.expert, 0), -1)
    np.testing.assert_allclose(
      routing.gate, np.where(routing.kept, gate, 0), atol=1e-6
    )  # fmt: skip


# A loop over two periods, whose blocks are computed anew in the backward pass,
# in two microbatches on four devices.
SPLIT = dict(
  batch_size=8,
  microbatches=2,
  mesh={'data': 2, 'expert': 2},
  model={
    'num_layers': 4,
    'remat': 'full',
    'scan_layers': True,
    'moe': {'num_selected': 2, 'group_size': 12},
  },
)


@pytest.mark.slow  # test_replay.py has quick ones
def test_choices_of_microbatches_in_loops_on_several_devices(tmp_path):
  run, variables, batch, record = first_step(tmp_path, 4, **SPLIT)
  assert len(record.layers) == 2
  check_tokens_choose(run, variables, batch, record)


@pytest.mark.slow
def test_choices_of_experts(tmp_path):
  _, _, batch, record = first_step(
    tmp_path,
    1,
    model={
      'moe': {'router': {'kind': 'expert_choice'}, 'allow_future_leak': True}
    },
  )
  info = traces.read(tmp_path / 'trace').header.layers[1]
  routing, real = record.layers[1], batch['segment_ids'] > 0
  assert info.by_expert and (routing.kept == (routing.expert >= 0)).all()
  exp = np.exp(routing.logits)
  probs = exp / exp.sum(-1, keepdims=True)
  for row, expert in np.ndindex(len(real), info.num_experts):
    is_chosen = (routing.expert[row] == expert).any(-1)
    assert is_chosen.sum() == min(info.capacity, real[row].sum())
    other_probs = probs[row, real[row] & ~is_chosen, expert]
    assert (
      probs[row, is_chosen, expert].min() >= other_probs.max(initial=0.0) - 1e-7
    )
    gate = routing.gate[row][routing.expert[row] == expert]
    np.testing.assert_allclose(gate, probs[row, is_chosen, expert], atol=1e-6)


def test_a_foreign_trace_is_refused_before_a_run_begins(tmp_path):
  traces.write(tmp_path / 'trace', traces.Header({}), [])
  options = tiny.options(trace=EVERY_STEP, sample=NO_SAMPLE)
  run = set_up(options, tmp_path, devices=jax.devices()[:1])
  with pytest.raises(ValueError, match=r'(?s)layers: .* to record anew$'):
    Traces().check(run)


def test_an_unknown_evaluation_is_refused():
  with pytest.raises(OptionError, match=r"trace.evaluations 'train_cap'; did"):
    tiny.options(trace={'evaluations': 'train_capacity, train_cap'})
  with pytest.raises(OptionError, match='where nothing is recorded'):
    tiny.options(trace={'logits': True})
  with pytest.raises(OptionError, match="'train' has a name that other"):
    tiny.options(
      trace={'evaluations': 'all'}, evals={'train': base.evaluation()}
    )


def test_steps_are_counted_from_the_first():
  options = TraceOptions(every_steps=3)
  assert [*filter(options.has_step, range(1, 10))] == [1, 4, 7]
  assert [*filter(TraceOptions(evaluations='all').has_step, range(9))] == []


class Fails(Hook):
  """Ends a run with an error before a step, as a crash would."""

  def __init__(self, step: int):
    self.step = step

  def start(self, run):
    train_step = run.train_step

    def failing(state, batch):
      if int(state.step) + 1 == self.step:
        raise RuntimeError('crash')
      return train_step(state, batch)

    return dataclasses.replace(run, train_step=failing)


@pytest.mark.slow
def test_a_run_records_each_step_once(tmp_path):
  trace = {'every_steps': 1, 'evaluations': 'all'}
  options = tiny.options(trace=trace, sample=NO_SAMPLE)
  devices = jax.devices()[:1]
  with pytest.raises(ValueError, match=r"sections \['trace'\]"):
    train_and_evaluate(options, tmp_path / 'run')
  hooks = [Fails(6), Traces()]  # after the checkpoint of step 4
  with pytest.raises(RuntimeError, match='crash'):
    train_and_evaluate(options, tmp_path / 'run', hooks=hooks, devices=devices)
  for folder in ('run', 'unbroken'):
    train_and_evaluate(
      options, tmp_path / folder, hooks=[Traces()], devices=devices
    )
  broken, unbroken = (
    traces.read(tmp_path / folder / 'trace') for folder in ('run', 'unbroken')
  )
  assert broken.steps_of('train') == (0, 1, 2, 3, 4, 5)
  assert broken.steps_of('train_capacity') == (3, 6)
  assert len([*broken.records()]) == 6 + 2 * 2
  for a, b in itertools.zip_longest(broken.records(), unbroken.records()):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_array_equal(x, y)
  _check_finished_run(tmp_path / 'unbroken', unbroken, tmp_path)


def _check_finished_run(workdir, trace, folder):
  """An evaluation and text of a finished run are recorded, too."""
  argv = ['--workdir', str(workdir), '--num_batches', '2']
  record_evaluation.main([*argv, '--trace', str(folder / 'again')])
  new_trace = traces.read(folder / 'again')
  final_records = trace.records('train_capacity', [6])
  for a, b in zip(new_trace.records('loss'), final_records, strict=True):
    for x, y in zip(a.layers[1], b.layers[1], strict=True):
      np.testing.assert_array_equal(x, y)
  argv += ['--room_for_all', '--logits', '--float32']
  record_evaluation.main([*argv, '--trace', str(folder / 'room')])
  room_trace = traces.read(folder / 'room')
  assert room_trace.header.has_logits and room_trace.header.dtype == 'float32'
  for record in room_trace.records():
    layer = record.layers[1]
    np.testing.assert_array_equal(layer.kept, layer.expert >= 0)
    assert layer.logits is not None
  generate.main(
    f'--workdir {workdir} --prompt hello --num_tokens 6 --trace '
    f'{folder / "text"}'.split()
  )
  text_trace = traces.read(folder / 'text')
  assert 'room for all' in text_trace.header.note
  (record,) = text_trace.records('generate')
  assert record.step == 6
  real = record.documents > 0
  assert bytes(record.tokens[real][:5].tolist()) == b'hello'
  assert record.positions[real].tolist() == [*range(5 + 6 - 1)]
  np.testing.assert_array_equal(record.layers[1].kept[..., 0], real)
