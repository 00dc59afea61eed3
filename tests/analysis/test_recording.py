"""The choices that a run records are those that its routers made."""

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
from moe_jax.training.setup import set_up
from tests.training import tiny
from tests.training.conftest import _equal_runs_share_programs  # noqa: F401
from tests.training.hooks import Kill

NO_SAMPLE = {'num_tokens': 0}
EVERY_STEP = {'every_steps': 1, 'logits': True, 'dtype': 'float32'}


def served_in_order(expert, capacity):
  """Marks choices of a group that find a slot, bool [S, K], in a plain loop."""
  loads, is_kept = {}, np.zeros(expert.shape, bool)
  for index in np.ndindex(*expert.shape):
    if (e := expert[index]) >= 0:
      is_kept[index] = loads.get(e, 0) < capacity
      loads[e] = loads.get(e, 0) + 1
  return is_kept


# A loop over two periods, whose blocks are computed anew in the backward pass,
# in two microbatches on four devices.
SPLIT = dict(
  batch_size=8, microbatches=2, mesh={'data': 2, 'expert': 2},
  model={
    'num_layers': 4, 'remat': 'full', 'scan_layers': True,
    'moe': {'num_selected': 2, 'group_size': 12},
  },
)  # fmt: skip


@pytest.mark.slow  # test_replay.py has quick ones
def test_choices_of_microbatches_in_loops_on_several_devices(tmp_path):
  options = tiny.options(trace=EVERY_STEP, sample=NO_SAMPLE, **SPLIT)
  run = set_up(options, tmp_path, devices=jax.devices()[:4])
  state, hook = run.programs.init_state(), Traces()
  variables = jax.tree.map(np.asarray, run.programs.variables(state))
  hook.check(run)
  run = hook.start(run)
  device_batch = next(run.batches(0))
  batch = {name: np.asarray(values) for name, values in device_batch.items()}
  _, metrics = run.train_step(state, device_batch)
  assert metrics.sums.choices is None
  hook.close()
  trace = traces.read(tmp_path / 'trace')
  (record,) = trace.records()
  # Choices equal those of a forward pass, drops and gates those of a loop.
  _, made = recording(run.model, variables, **run.model.inputs(batch))
  made = jax.tree.map(np.asarray, made)
  (expected,) = records_of(run.model, 'train', 0, 0, batch, made)
  for a, b in zip(record[:6], expected[:6], strict=True):
    np.testing.assert_array_equal(a, b)
  real = batch['segment_ids'] > 0
  np.testing.assert_array_equal(record.documents, batch['segment_ids'])
  assert list(record.layers) == list(run.model.stacks.sparse_layers) == [1, 3]
  for layer, routing in record.layers.items():
    info = trace.header.layers[layer]
    np.testing.assert_array_equal(routing.expert, expected.layers[layer].expert)
    assert ((routing.expert >= 0) == real[..., None]).all()
    groups = routing.expert.reshape(-1, info.group_size, info.num_selected)
    is_kept = [served_in_order(g, info.capacity) for g in groups]
    assert np.ravel(is_kept).tolist() == routing.kept.ravel().tolist()
    shifted = np.exp(routing.logits - routing.logits.max(-1, keepdims=True))
    probs = shifted / shifted.sum(-1, keepdims=True)
    gate = np.take_along_axis(probs, np.maximum(routing.expert, 0), -1)
    np.testing.assert_allclose(
      routing.gate, np.where(routing.kept, gate, 0), atol=1e-6
    )  # fmt: skip


def test_a_foreign_trace_is_refused_before_a_run_begins(tmp_path):
  traces.write(tmp_path / 'trace', traces.Header({}), [])
  options = tiny.options(trace=EVERY_STEP, sample=NO_SAMPLE)
  run = set_up(options, tmp_path, devices=jax.devices()[:1])
  with pytest.raises(ValueError, match=r'(?s)layers: .* to record anew$'):
    Traces().check(run)


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'trace': {'evaluations': 'train_cap'}}, r"'train_cap'; did"),
    ({'trace': {'logits': True}}, 'where nothing is recorded'),
    (
      {'trace': {'evaluations': 'all'}, 'evals': {'train': base.evaluation()}},
      "'train' has a name that other",
    ),
  ],
)
def test_what_would_not_be_recorded_is_refused(overrides, message):
  with pytest.raises(OptionError, match=message):
    tiny.options(**overrides)


@pytest.mark.slow
def test_a_run_records_each_step_once(tmp_path):
  trace = {'every_steps': 1, 'evaluations': 'all'}
  options = tiny.options(trace=trace, sample=NO_SAMPLE)
  devices = jax.devices()[:1]
  with pytest.raises(ValueError, match=r"sections \['trace'\]"):
    train_and_evaluate(options, tmp_path / 'run')
  hooks = [Kill(6), Traces()]  # after the checkpoint of step 4
  with pytest.raises(KeyboardInterrupt):
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
  for a, b in zip(broken.records(), unbroken.records(), strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
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
  argv += ['--room_for_all', '--trace', str(folder / 'room')]
  record_evaluation.main(argv)
  for record in traces.read(folder / 'room').records():
    layer = record.layers[1]
    np.testing.assert_array_equal(layer.kept, layer.expert >= 0)
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
