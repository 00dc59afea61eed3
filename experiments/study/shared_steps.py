"""Shares one compiled step among runs that differ only in some numbers.

The weights of the routers' losses and the rate of a balancing bias, constants
of a run's own step, are arguments of the shared step. A zero stays a constant,
so that a loss without weight is not computed.
"""

import dataclasses
import functools
import json
from typing import Any

import jax

from moe_jax.config import flatten, section_of
from moe_jax.training.programs import make_step
from moe_jax.training.setup import Hook, Run

# Ends of the dotted names of the routers' options that become arguments.
_WEIGHT, _RATE = '_weight', '.balance_bias_rate'
# Beginnings of the keys on which no shared step depends. `distill.` is one of
# them, as a run that learns from soft labels has a step of its own: the hook of
# distillation, which comes later, puts it in the place of the shared one.
_OTHER = (
  'seed', 'log_every_steps', 'data.source.', 'data.mixture.', 'evals.',
  'checkpoint.', 'sample.', 'init_from.', 'distill.'
)  # fmt: skip

_steps: dict[str, Any] = {}


class SharedStep(Hook):
  """Replaces a run's step by one that earlier runs of this process compiled.

  A run keeps its own step if it has several devices, or if its layers differ in
  the rate of their balancing bias.
  """

  def start(self, run: Run) -> Run | None:
    """Replaces the step, if the run can share a step."""
    options = flatten(section_of(run.options))
    rates = {v for k, v in options.items() if k.endswith(_RATE) and v}
    unequal = len(rates) > 1
    if unequal or run.mesh.size > 1:
      return None
    weights = {
      loss: weight
      for loss, weight in run.model.stacks.loss_weights().items()
      if weight
    }
    rate = rates.pop() if rates else None
    key = _key(options | {'vocab_size': run.dataset.vocab_size})
    if key not in _steps:
      _steps[key] = _compiled(run)
    step = functools.partial(_steps[key], weights, rate)
    return dataclasses.replace(run, train_step=step)


def _key(options: dict[str, Any]) -> str:
  """A key that is equal for runs that can share a step."""
  relevant = {k: v for k, v in options.items() if not k.startswith(_OTHER)}
  placeholders = {
    k: 'given'
    for k, v in relevant.items()
    if v and '.router.' in k and k.endswith((_WEIGHT, _RATE))
  }
  return json.dumps(relevant | placeholders, sort_keys=True, default=str)


def _compiled(run: Run):
  options, model = run.options, run.model

  def step(weights, rate, state, batch):
    train_step = make_step(
      options,
      model,
      run.programs.adapters,
      run.programs.trained,
      run.programs.optimizer,
      change=lambda losses: dataclasses.replace(
        losses, routers={**losses.routers, **weights}
      ),
      balance_bias_rate=rate,
    )
    return train_step(state, batch)

  return jax.jit(step, donate_argnums=2)
