"""The running mean of parameters: its weights, and who reads it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import finetuning, generation, run_config
from moe_jax.analysis import cost
from moe_jax.runs import metrics
from moe_jax.runs.summary import StepMetrics
from moe_jax.training import averages, loop
from moe_jax.training.programs import make_programs
from moe_jax.training.step import TrainState
from moe_jax.training.trainable import Trained
from tests.training import tiny

ALL = Trained('all', frozenset({'w'}))


def means_after(first, changes, decay):
  """The mean and the state after each of some steps, which add changes."""
  metrics = StepMetrics(*[None] * len(StepMetrics._fields))

  def add(state, change):
    params = {'w': state.params['w'] + change}
    return state.replace(params=params), metrics

  step = averages.averaging(add, decay, ALL)
  zero = jnp.zeros((), jnp.int32)
  state = averages.begun(TrainState(zero, zero, {'w': first}, ()), decay, ALL)
  assert averages.averaged(state.params, state.averages) == state.params
  for change in changes:
    state, _ = step(state, change)
    yield averages.averaged(state.params, state.averages)['w'], state


def test_the_mean_of_three_steps_has_no_weight_of_the_first_values():
  # Steps of -1 from 10 make 9, 8 and 7. With ema=0.5 their weights are 1, 2
  # and 4 sevenths, and 10 has none.
  means = [m for m, _ in means_after(jnp.array(10.0), [-1.0] * 3, 0.5)]
  expected = [9, (9 + 2 * 8) / 3, (9 + 2 * 8 + 4 * 7) / 7]
  np.testing.assert_allclose(means, expected, rtol=1e-6)
  # Nor has it with a decay near one.
  ((mean, _),) = means_after(jnp.array(10.0), [-1.0], 0.999999)
  np.testing.assert_allclose(mean, 9, rtol=1e-6)


def test_small_changes_of_bfloat16_parameters_are_not_lost():
  # Half of the steps end at 1, half at 1 + 1/128, the next number of bfloat16.
  changes = [jnp.bfloat16((-1) ** i / 128) for i in range(6)]
  *_, (mean, state) = means_after(jnp.ones((), jnp.bfloat16), changes, 0.999)
  assert mean.dtype == jnp.bfloat16
  np.testing.assert_allclose(state.averages.mean['w'], 1 + 0.5 / 128, atol=1e-5)


def options_of(**overrides):
  return run_config.read(
    tiny.config(
      optimizer=dict(ema=0.8, learning_rate=0.05),
      evals=dict(train_capacity=dict(every_steps=0)),
      sample=dict(num_tokens=0),
      **overrides,
    )
  )


def train(options, workdir, **kwargs):
  return loop.train_and_evaluate(
    options, workdir, devices=jax.devices()[:1], **kwargs
  )


@pytest.fixture(scope='module')
def averaged_run(tmp_path_factory):
  """The folder of a run with means, and its last state."""
  workdir = tmp_path_factory.mktemp('averaged')
  return workdir, train(options_of(), workdir)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def loss_of(workdir):
  rows = metrics.read_metrics(workdir / metrics.FILE_NAME)
  losses = [row.get('eval/train_capacity/loss') for row in rows]
  return [loss for loss in losses if loss is not None][-1]


def test_a_run_is_evaluated_and_read_by_its_means(averaged_run, tmp_path):
  workdir, state = averaged_run
  mean = state.averages.mean
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), mean, state.params)
  assert all(jax.tree.leaves(moved))
  # Generation, export and compression read it as evaluation has it.
  assert_equal(generation.load(workdir).variables['params'], mean)
  # A run without means that begins with these has that loss at rate 0.
  config = tiny.config(
    optimizer=dict(learning_rate=0.0),
    init_from=dict(workdir=str(workdir)),
    total_steps=1,
    sample=dict(num_tokens=0),
  )
  train(run_config.read(config), tmp_path, initial=finetuning.initial)
  assert loss_of(tmp_path) == loss_of(workdir)


def test_a_run_that_was_stopped_goes_on_with_its_mean(averaged_run, tmp_path):
  _, state = averaged_run
  train(options_of(total_steps=4), tmp_path)
  gone_on = train(options_of(), tmp_path, resume=True)
  assert_equal(gone_on.averages, state.averages)


def test_without_means_their_run_is_not_gone_on_with(averaged_run):
  workdir, _ = averaged_run
  with pytest.raises(ValueError, match='unexpected: averages'):
    train(run_config.read(tiny.config(total_steps=8)), workdir, resume=True)


def test_parameters_that_do_not_train_have_no_mean():
  options = options_of(trainable='router')
  mesh = options.mesh.make(jax.devices()[:1])
  programs = make_programs(options, tiny.model_of(options), mesh)
  mean = programs.abstract_state.averages.mean
  (leaf,) = jax.tree.leaves(mean)
  assert leaf.dtype == jnp.float32
  state = tiny.first_state(programs)
  assert_equal(
    programs.variables(state)['params']['embedding'], state.params['embedding']
  )


def test_the_bytes_of_means_are_counted():
  def optimizer_bytes(**ema):
    options = run_config.read(tiny.config(optimizer=ema)).filled(257)
    mesh = options.mesh.make(jax.devices()[:1])
    programs = make_programs(options, options.build(), mesh)
    return cost.run_bytes(options, options.build(), programs, mesh)

  plain, averaged = optimizer_bytes(), optimizer_bytes(ema=0.9)
  means = averaged.optimizer - plain.optimizer
  assert means == plain.parameters + 4  # float32, and the count of steps
