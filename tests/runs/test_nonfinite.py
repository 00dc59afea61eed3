"""Non-finite steps are skipped up to a limit, recorded, then end the run.

That none is skipped by default is in `tests/training/test_loop.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import data
from moe_jax.runs import metrics
from moe_jax.runs.recorder import NonFiniteError
from moe_jax.training import loop
from moe_jax.training.setup import Hook
from tests.training import tiny
from tests.training.conftest import _equal_runs_share_programs  # noqa: F401

OPTIONS = tiny.options(
  max_nonfinite_steps=2,
  checkpoint={'every_steps': 1, 'keep_newest': 6},
  model={'dropout': 0.1},
)


class Poison(Hook):
  """Makes the loss of given steps infinite, and keeps every step's state."""

  def __init__(self, *steps):
    self.steps = steps

  def start(self, run):
    self.states, train_step = {}, run.train_step

    def step_on(state, batch):
      if int(state.step) + 1 in self.steps:
        weights = batch['loss_weights'].at[0, 0].set(jnp.inf)
        batch = batch | {'loss_weights': weights}
      state, step_metrics = train_step(state, batch)
      self.states[int(state.step)] = jax.device_get(state)
      return state, step_metrics

    return dataclasses.replace(run, train_step=step_on)


def train(workdir, *steps, options=OPTIONS):
  hook = Poison(*steps)
  try:
    loop.train_and_evaluate(
      options, workdir, hooks=[hook], devices=jax.devices()[:1]
    )
  finally:
    hook.files = sorted((workdir / 'nonfinite').glob('*'))
  return hook


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_a_step_is_left_out_and_all_else_goes_on(tmp_path, capsys):
  hook = train(tmp_path, 3)
  before, after = hook.states[2], hook.states[3]
  assert after.step == 3
  assert_equal(after.replace(step=before.step), before)
  # The next step has the next batch and noise, and the kept state.
  assert any(
    (a != b).any()
    for a, b in zip(
      *map(jax.tree.leaves, (after.params, hook.states[4].params))
    )
  )
  assert [path.name for path in hook.files] == ['3.npz']
  saved_batch = np.load(hook.files[0])
  batches = data.train_batches(
    data.load(OPTIONS.data).splits['train'],
    batch_size=OPTIONS.batch_size,
    seed=OPTIONS.seed,
    start=2,
  )
  assert_equal(dict(saved_batch), next(batches))
  output = capsys.readouterr().out.splitlines()
  (line,) = [line for line in output if 'left out' in line]
  assert line.startswith('step 3: loss=') and '1 of at most 2' in line
  assert str(hook.files[0]) in line
  # The row of steps 3 and 4 has the loss of step 4 alone.
  rows = metrics.read_metrics(tmp_path / metrics.FILE_NAME)
  (row,) = [r for r in rows if r['step'] == 4 and 'train/loss' in r]
  assert np.isfinite(row['train/loss'])


@pytest.mark.slow
def test_one_too_many_stops_the_run_and_a_restart_remembers(tmp_path):
  with pytest.raises(NonFiniteError, match=r'step 5: loss=(.|\n)*5\.npz') as e:
    train(tmp_path, 2, 4, 5)
  assert 'last good checkpoint: step 4' in str(e.value)
  # Steps 2 and 4 precede the checkpoint and count; step 5 is repeated.
  with pytest.raises(NonFiniteError, match='step 6: '):
    train(tmp_path, 6)
  # The step that stopped the run before was finite this time, and does not
  # count.
  file_names = {path.name for path in (tmp_path / 'nonfinite').iterdir()}
  assert file_names == {'2.npz', '4.npz', '6.npz'}
  hook = train(tmp_path)
  assert hook.states.keys() == {6}
