"""A state that is not finite ends the run by name, and is never saved as good.

Loss and gradient of the step are finite; the update is not.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.runs import finite
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.ownership import OwnedError
from moe_jax.runs.recorder import NonFiniteError
from moe_jax.runs.summary import StepMetrics
from moe_jax.runs.workdir import CHECKPOINTS
from moe_jax.training import loop, step
from moe_jax.training.optimizer import AdamW
from tests.training import tiny
from tests.training.hooks import StepHook

STEPS = {'checkpoint': {'every_steps': 1, 'keep_newest': 9}}


@dataclasses.dataclass(frozen=True)
class Bursting(AdamW):
  """Adam whose third update is infinite, as a learning rate may be."""

  def preconditioner(self, axes, roles):
    scale = optax.scale_by_schedule(
      lambda count: jnp.where(count == 2, jnp.inf, 1.0)
    )
    return optax.chain(super().preconditioner(axes, roles), scale)


def bursting(**overrides):
  options = tiny.options(total_steps=3, model=tiny.ONE_LAYER, **overrides)
  optimizer = Bursting(schedule=options.optimizer.schedule)
  return dataclasses.replace(options, optimizer=optimizer)


def train(workdir, options, *hooks):
  loop.train_and_evaluate(
    options, workdir, hooks=hooks, devices=jax.devices()[:1]
  )


def test_it_ends_the_run_and_the_step_before_is_good(tmp_path):
  """The last step is checked, too, although no later loss would reveal it."""
  with pytest.raises(NonFiniteError) as error:
    train(tmp_path, bursting(**STEPS))
  message = str(error.value)
  first = message.splitlines()[0]
  assert first.startswith('step 3: loss=5.') and 'nan' not in first
  assert 'not finite in the new state: params/' in first and ' more' in first
  assert 'last good checkpoint: step 2' in message
  assert 'and go on with --resume' in message
  with Checkpointer(tmp_path / CHECKPOINTS) as checkpoints:
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.newest_good() == 2


def test_without_a_checkpoint_the_advice_is_to_begin_anew(tmp_path):
  with pytest.raises(NonFiniteError, match=r'(?s)checkpoint: none.*begin anew'):
    train(tmp_path, bursting(checkpoint={'every_steps': 0}))
  assert not list((tmp_path / CHECKPOINTS).glob('*'))


def test_a_step_with_such_a_state_is_left_out():
  old = {'w': jnp.ones(2), 'n': jnp.int32(1)}
  state = step.TrainState(jnp.int32(4), jnp.uint32(0), old, {})

  def train_step(state, batch):
    w = jnp.stack([jnp.float32(1), batch['value']])
    new = state.replace(step=state.step + 1, params={**old, 'w': w})
    numbers = dict(loss=jnp.float32(1), grad_norm=jnp.float32(2))
    return new, StepMetrics(
      **numbers, sums=None, learning_rate=None, finite=finite.flags(new)
    )

  for value, expected in ((3.0, [1, 3]), (np.nan, [1, 1]), (-np.inf, [1, 1])):
    new, metrics = step.skipping_nonfinite(train_step)(
      state, {'value': jnp.float32(value)}
    )
    np.testing.assert_array_equal(new.params['w'], expected)
    assert int(new.step) == 5
    bad_names = [] if np.isfinite(value) else ['params/w']
    assert finite.names(state, np.asarray(metrics.finite)) == bad_names


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_one_value_of_many_is_found(value, dtype):
  """The value is found among the largest numbers, whose sum overflows, too."""
  most = float(jnp.finfo(dtype).max)
  large = jnp.full((7, 33), most, dtype).at[2].set(-most)
  flags = jax.jit(finite.flags)([large, large.at[3, 5].set(value)])
  assert flags.tolist() == [True, False]


def test_names_and_numbers_of_leaves():
  tree = {'a': jnp.ones(2), 'b': [jnp.arange(3), jnp.array([1, jnp.nan])]}
  assert finite.flags(tree).tolist() == [True, False]
  assert finite.not_finite(tree) == ['b/1']
  assert finite.not_finite({'n': jnp.int32(3)}) == []


class Taken(StepHook):
  """Gives the workdir to another job during a step, as after a long sleep."""

  def __init__(self, workdir):
    self.workdir = workdir

  def step(self, train_step, state, batch):
    if int(state.step) == 3:
      (self.workdir / 'owner.json').unlink()
    return train_step(state, batch)


@pytest.mark.slow
def test_a_job_that_lost_its_workdir_writes_nothing_more(tmp_path):
  with pytest.raises(OwnedError, match=r'owner\.json is gone'):
    train(
      tmp_path, tiny.options(model=tiny.ONE_LAYER, **STEPS), Taken(tmp_path)
    )
  with Checkpointer(tmp_path / CHECKPOINTS) as checkpoints:
    assert checkpoints.steps() == [1, 2, 3]
  rows = (tmp_path / 'metrics.jsonl').read_text()
  assert '"step": 2' in rows and '"step": 4' not in rows
