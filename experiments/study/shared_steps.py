"""One compiled step for runs that differ in numbers it can be given.

Weights of the routers' losses and the rate of a balancing bias are arguments of
the step here, where a run by itself has them as constants. Zero is a constant
still: what has no weight is not computed.
"""

import dataclasses
import functools
import json
from typing import Any

import jax

from moe_jax import sections
from moe_jax.training.programs import make_step
from moe_jax.training.setup import Hook, Run

# Options of routers, by the end of their dotted name.
_WEIGHT, _RATE = '_weight', '.balance_bias_rate'
# Keys on which no training step depends.
_OTHER = ('seed', 'log_every_steps', 'evals.', 'checkpoint.', 'sample.')

_steps: dict[str, Any] = {}


class SharedStep(Hook):
  """Takes the run's step from the runs of this process before it.

  A run on several devices keeps its own, and so does one whose layers differ
  in their rates.
  """

  def start(self, run: Run) -> None:
    """Puts it in the place of `run.train_step`."""
    options = sections.flatten(sections.section(run.options))
    rates = {v for k, v in options.items() if k.endswith(_RATE) and v}
    unequal = len(rates) > 1
    if unequal or run.mesh.size > 1 or run.options.max_nonfinite_steps:
      return
    weights = {
      name.removesuffix('_loss'): weight
      for name, weight in run.model.loss_weights().items()
      if weight
    }
    rate = rates.pop() if rates else None
    key = _key(options)
    if key not in _steps:
      _steps[key] = _compiled(run)
    run.train_step = functools.partial(_steps[key], weights, rate)


def _key(options: dict[str, Any]) -> str:
  """A text that is equal for runs which may share a step."""
  kept = {k: v for k, v in options.items() if not k.startswith(_OTHER)}
  given = {
    k: 'given'
    for k, v in kept.items()
    if v and '.router.' in k and k.endswith((_WEIGHT, _RATE))
  }
  return json.dumps(kept | given, sort_keys=True, default=str)


def _compiled(run: Run):
  options, model = run.options, run.model
  optimizer = run.programs.optimizer

  def step(weights, rate, state, batch):
    train_step = make_step(
      options,
      model,
      optimizer,
      change=lambda losses: dataclasses.replace(losses, **weights),
      balance_bias_rate=rate,
    )
    return train_step(state, batch)

  return jax.jit(step, donate_argnums=2)
