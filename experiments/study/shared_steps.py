"""One compiled step for runs that differ in numbers it can be given.

Weights of losses and the rate of a balancing bias are arguments of the step
here, where a run alone has them as constants. Zero is a constant still: what
has no weight is not computed.
"""

import dataclasses
import functools
import json
from typing import Any

import jax

from moe_jax.config import flatten
from moe_jax.training.setup import Hook, Run, make_step

_MOE = 'model.moe.'
WEIGHTS = {
  f'{_MOE}balance_weight': 'balance',
  f'{_MOE}z_weight': 'z',
  f'{_MOE}importance_weight': 'importance',
  f'{_MOE}load_weight': 'load',
}
RATE = f'{_MOE}balance_bias_rate'
# What no training step depends on.
_OTHER = ('seed', 'log_every_steps', 'evals.', 'checkpoint.', 'sample.')

_steps: dict[str, Any] = {}


class SharedStep(Hook):
  """Takes the run's step from the runs of this process before it.

  Of a run on one device; others keep their own.
  """

  def start(self, run: Run) -> None:
    """Puts it in the place of `run.train_step`."""
    if run.mesh.size > 1 or run.config.max_nonfinite_steps:
      return
    flat = flatten(run.config)
    given = {key: flat[key] for key in [*WEIGHTS, RATE] if flat[key]}
    key = _key(flat, given)
    if key not in _steps:
      _steps[key] = _compiled(run)
    run.train_step = functools.partial(_steps[key], given)


def _key(flat: dict[str, Any], given: dict[str, float]) -> str:
  """Equal for runs that may share a step."""
  kept = {k: v for k, v in flat.items() if not k.startswith(_OTHER)}
  masked = kept | dict.fromkeys(given, 'given')
  return json.dumps(masked, sort_keys=True, default=str)


def _compiled(run: Run):
  config, model = run.config, run.model
  optimizer = run.programs.optimizer

  def step(given, state, batch):
    weights = {
      name: given[key] for key, name in WEIGHTS.items() if key in given
    }
    train_step = make_step(
      config,
      model,
      optimizer,
      change=lambda found: dataclasses.replace(found, **weights),
      balance_bias_rate=given.get(RATE),
    )
    return train_step(state, batch)

  return jax.jit(step, donate_argnums=1)
