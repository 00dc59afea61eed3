"""Full-batch gradient descent on many small mixtures at once.

All learning rates and seeds of a system are one compiled program. A run stops
where its training error reaches the criterion, and keeps the weights it had
there. Not here: which systems, and what their epochs mean
(`jacobs_table1.py`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.models.adaptive import (
  LOSSES,
  AdaptiveConfig,
  AdaptiveMixture,
  AdaptiveOutputs,
)

CHUNK = 50  # epochs between two looks at who is still running


class Cases(NamedTuple):
  """Cases of one split.

  Attributes:
    features: float32 [N, M].
    targets: float32 [N, V], between 0 and 1.
  """

  features: Any
  targets: Any


class Runs(NamedTuple):
  """What became of [R, S] runs: R learning rates, S seeds.

  Attributes:
    epochs: int32 [R, S], updates until the criterion; where it was not
      reached, those made.
    reached: bool [R, S].
    params: A tree of [R, S, ...]: the weights where the run stopped.
  """

  epochs: Any
  reached: Any
  params: Any


@dataclasses.dataclass(frozen=True)
class Stop:
  """When a run ends.

  Attributes:
    error: Mean over cases of the blend's squared error, summed over outputs.
    max_epochs: A multiple of `CHUNK`.
  """

  error: float = 0.08
  max_epochs: int = 10_000


def start(model: AdaptiveMixture, features, seeds: int):
  """Weights of so many seeds: a tree of [S, ...]."""

  def one(seed):
    key = jax.random.fold_in(jax.random.key(1991), seed)
    return nn.meta.unbox(model.init(key, features[:1])['params'])

  return jax.vmap(one)(jnp.arange(seeds))


def forward(model: AdaptiveMixture, params, features) -> AdaptiveOutputs:
  """Of one run's weights."""
  return model.apply({'params': params}, features)[0]


def squared_error(outputs: AdaptiveOutputs, targets):
  """The criterion: ||d - sum_i p_i o_i||^2, the mean over cases."""
  return jnp.mean(jnp.sum((targets - outputs.prediction) ** 2, axis=-1))


def _epoch(model, cases, stop, rate, state):
  """One update of one run that goes on."""
  params, epochs, reached = state

  def error(params):
    outputs = forward(model, params, cases.features)
    loss = LOSSES[model.config.loss](
      outputs.expert_outputs, outputs.gate_logits, cases.targets
    )
    return jnp.mean(loss), squared_error(outputs, cases.targets)

  gradients, squared = jax.grad(error, has_aux=True)(params)
  reached = reached | (squared <= stop.error)
  step = jnp.where(reached, 0.0, rate)
  params = jax.tree.map(lambda p, g: p - step * g, params, gradients)
  return params, epochs + ~reached, reached


@functools.partial(jax.jit, static_argnames=('model', 'stop'))
def _train(model, stop, params, cases, rates):
  def many(state):
    one = functools.partial(_epoch, model, cases, stop)
    over_seeds = jax.vmap(one, (None, 0))
    return jax.vmap(over_seeds, (0, 0))(rates, state)

  def chunk(carry):
    made, state = carry
    body = lambda state, _: (many(state), None)
    state, _ = jax.lax.scan(body, state, length=CHUNK)
    return made + CHUNK, state

  def goes_on(carry):
    made, (_, _, reached) = carry
    return (made < stop.max_epochs) & ~jnp.all(reached)

  R, S = rates.shape[0], jax.tree.leaves(params)[0].shape[0]
  spread = lambda leaf: jnp.broadcast_to(leaf[None], (R, *leaf.shape))
  nothing = jnp.zeros((R, S), jnp.int32)
  state = jax.tree.map(spread, params), nothing, nothing.astype(bool)
  _, state = jax.lax.while_loop(goes_on, chunk, (0, state))
  return state


def train(
  config: AdaptiveConfig,
  cases: Cases,
  rates: Sequence[float],
  seeds: int,
  stop: Stop,
) -> Runs:
  """All runs of a system; a seed starts alike at every rate."""
  model = AdaptiveMixture(config)
  params = start(model, cases.features, seeds)
  state = _train(
    model, stop, params, cases, jnp.asarray(rates, jnp.float32)
  )
  params, epochs, reached = jax.tree.map(np.asarray, state)
  return Runs(epochs, reached, params)
