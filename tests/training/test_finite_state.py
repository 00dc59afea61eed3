"""What is not finite is left out up to a limit, then ends the run by name.

A state of which loss and gradient are finite, but not the update, is never
saved as good.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import data
from moe_jax.runs import finite, metrics
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


OPTIONS = tiny.options(
  max_nonfinite_steps=2,
  checkpoint={'every_steps': 1, 'keep_newest': 6},
  model={'dropout': 0.1},
)


class Poison(StepHook):
  """Makes the loss of given steps infinite, and keeps every step's state."""

  def __init__(self, *steps):
    self.steps, self.states = steps, {}

  def step(self, train_step, state, batch):
    if int(state.step) + 1 in self.steps:
      weights = batch['loss_weights'].at[0, 0].set(jnp.inf)
      batch = batch | {'loss_weights': weights}
    state, step_metrics = train_step(state, batch)
    self.states[int(state.step)] = jax.device_get(state)
    return state, step_metrics


@pytest.mark.slow
def test_steps_are_left_out_until_one_too_many_and_a_restart_remembers(
  tmp_path, capsys
):
  hook = Poison(2, 4, 5)
  with pytest.raises(NonFiniteError, match=r'step 5: loss=(.|\n)*5\.npz') as e:
    train(tmp_path, OPTIONS, hook)
  assert 'last good checkpoint: step 4' in str(e.value)
  assert 'layer 1: router logit RMS' in str(e.value)
  # Step 2 counts and changes nothing; step 3 has the kept state.
  one, two, three = (hook.states[step] for step in (1, 2, 3))
  assert two.step == 2
  jax.tree.map(np.testing.assert_array_equal, two.replace(step=one.step), one)
  leaves = zip(*map(jax.tree.leaves, (two.params, three.params)))
  assert any((a != b).any() for a, b in leaves)
  # The batch that was left out is kept.
  batches = data.train_batches(
    data.load(OPTIONS.data).splits['train'],
    batch_size=OPTIONS.batch_size,
    seed=OPTIONS.seed,
    start=1,
  )
  kept = dict(np.load(tmp_path / 'nonfinite' / '2.npz'))
  jax.tree.map(np.testing.assert_array_equal, kept, next(batches))
  lines = [x for x in capsys.readouterr().out.splitlines() if 'left out' in x]
  assert lines[0].startswith('step 2: loss=') and '1 of at most 2' in lines[0]
  # The row of steps 1 and 2 has the loss of step 1 alone.
  rows = metrics.read_metrics(tmp_path / metrics.FILE_NAME)
  (row,) = [r for r in rows if r['step'] == 2 and 'train/loss' in r]
  assert np.isfinite(row['train/loss'])
  # Steps 2 and 4 precede the checkpoint and count; step 5 is repeated.
  with pytest.raises(NonFiniteError, match='step 6: '):
    train(tmp_path, OPTIONS, Poison(6))
  # The step that stopped the run before was finite this time, and does not
  # count.
  file_names = {path.name for path in (tmp_path / 'nonfinite').iterdir()}
  assert file_names == {'2.npz', '4.npz', '6.npz'}
  hook = Poison()
  train(tmp_path, OPTIONS, hook)
  assert hook.states.keys() == {6}
