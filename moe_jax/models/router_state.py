"""The collection `router_state`: what routers keep that no gradient moves.

`apply` reads it; a train step moves it by the loads of the whole batch. Not
here: the rules (`moe_jax.routing.balance_bias`, `running_totals`).
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.models.pattern import segments
from moe_jax.routing import balance_bias
from moe_jax.shapes import Array, Float32, Leaf

COLLECTION = 'router_state'
BIAS = 'balance_bias'


@runtime_checkable
class OwnRule(Protocol):
  """The config of a model that keeps something else than a balancing bias."""

  @property
  def keeps_router_state(self) -> bool:
    """Whether the model has the collection."""

  def moved(
    self, router_state: dict[str, Any], load: Float32[Array, 'L E']
  ) -> dict[str, Any]:
    """The collection after a step, as `moved` of the module."""


def abstract_router_state(model: nn.Module, seq_len: int) -> dict[str, Any]:
  """Shapes of the collection; {} where the model keeps none."""
  if not _keeps(model.config):
    return {}
  tokens = jnp.zeros((1, seq_len), jnp.int32)
  shapes = jax.eval_shape(
    lambda key: model.init(key, **model.example(tokens)), jax.random.key(0)
  )
  return nn.meta.unbox(shapes.get(COLLECTION, {}))


def _keeps(config: Any) -> bool:
  if isinstance(config, OwnRule):
    return config.keeps_router_state
  return config.moe is not None and config.moe.router.balance_bias_rate > 0


def init_router_state(model: nn.Module, seq_len: int) -> dict[str, Any]:
  """The collection before the first step: zeros."""
  shapes = abstract_router_state(model, seq_len)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def variables(params: Any, router_state: Any) -> dict[str, Any]:
  """What `apply` takes: the collections that are there."""
  kept = {COLLECTION: router_state} if router_state else {}
  return {'params': params, **kept}


def moved(
  config: Any,
  router_state: dict[str, Any],
  load: Float32[Array, 'L E'],
  rate: Leaf | None = None,
) -> dict[str, Any]:
  """The collection after a step.

  Args:
    config: The model's.
    router_state: Before the step.
    load: Of every layer, choices per expert of the whole batch.
    rate: Of the bias; None: the config's.
  """
  if not router_state:
    return router_state
  if isinstance(config, OwnRule):
    return config.moved(router_state, load)
  if rate is None:
    rate = config.moe.router.balance_bias_rate
  loads = by_router(config, load)
  return jax.tree.map(
    lambda bias, load: balance_bias.moved(bias, load, rate), router_state, loads
  )


def by_router(config: Any, per_layer: Float32[Array, 'L E']) -> dict[str, Any]:
  """Rows of layers as a tree like the collection: leaves [repeats, E]."""
  tree, first = {}, 0
  for path, stack in config.stacks:
    own = tree
    for name in path:
      own = own.setdefault(name, {})
    for segment in segments(stack.sparse):
      rows = per_layer[first : first + segment.num_layers]
      rows = rows.reshape(segment.repeats, -1, rows.shape[-1])
      for i, sparse in enumerate(segment.pattern):
        if sparse:
          layer = own.setdefault(segment.name, {})
          layer[f'layer_{i}'] = {'moe': {'router': {BIAS: rows[:, i]}}}
      first += segment.num_layers
  return tree
