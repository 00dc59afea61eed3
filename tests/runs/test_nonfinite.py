"""Non-finite steps are skipped up to a limit, recorded, then end the run.

That none is skipped by default is in `tests/training/test_loop.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import data
from moe_jax.runs import metrics
from moe_jax.runs.recorder import NonFiniteError
from moe_jax.training import loop
from tests.training import tiny
from tests.training.conftest import _equal_runs_share_programs  # noqa: F401
from tests.training.hooks import StepHook

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


def train(workdir, hook):
  loop.train_and_evaluate(
    OPTIONS, workdir, hooks=[hook], devices=jax.devices()[:1]
  )


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_steps_are_left_out_until_one_too_many_and_a_restart_remembers(
  tmp_path, capsys
):
  hook = Poison(2, 4, 5)
  with pytest.raises(NonFiniteError, match=r'step 5: loss=(.|\n)*5\.npz') as e:
    train(tmp_path, hook)
  assert 'last good checkpoint: step 4' in str(e.value)
  # Step 2 counts and changes nothing; step 3 has the kept state.
  one, two, three = (hook.states[step] for step in (1, 2, 3))
  assert two.step == 2
  assert_equal(two.replace(step=one.step), one)
  leaves = zip(*map(jax.tree.leaves, (two.params, three.params)))
  assert any((a != b).any() for a, b in leaves)
  # The batch that was left out is kept.
  batches = data.train_batches(
    data.load(OPTIONS.data).splits['train'],
    batch_size=OPTIONS.batch_size,
    seed=OPTIONS.seed,
    start=1,
  )
  assert_equal(dict(np.load(tmp_path / 'nonfinite' / '2.npz')), next(batches))
  lines = [x for x in capsys.readouterr().out.splitlines() if 'left out' in x]
  assert lines[0].startswith('step 2: loss=') and '1 of at most 2' in lines[0]
  # The row of steps 1 and 2 has the loss of step 1 alone.
  rows = metrics.read_metrics(tmp_path / metrics.FILE_NAME)
  (row,) = [r for r in rows if r['step'] == 2 and 'train/loss' in r]
  assert np.isfinite(row['train/loss'])
  # Steps 2 and 4 precede the checkpoint and count; step 5 is repeated.
  with pytest.raises(NonFiniteError, match='step 6: '):
    train(tmp_path, Poison(6))
  # The step that stopped the run before was finite this time, and does not
  # count.
  file_names = {path.name for path in (tmp_path / 'nonfinite').iterdir()}
  assert file_names == {'2.npz', '4.npz', '6.npz'}
  hook = Poison()
  train(tmp_path, hook)
  assert hook.states.keys() == {6}
