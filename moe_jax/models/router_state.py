"""The collection `router_state`: variables of routers without gradients.

`apply` reads it; a train step updates it by the loads of the whole batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers.routers.contract import ROUTER_STATE as COLLECTION
from moe_jax.models.base import Model
from moe_jax.models.parameter_trees import abstract_variables

__all__ = [
  'COLLECTION',
  'abstract_router_state',
  'init_router_state',
  'variables',
]


def abstract_router_state(model: Model) -> dict[str, Any]:
  """The shapes of the collection; {} for a model without it."""
  if not model.keeps_router_state:
    return {}
  return nn.meta.unbox(abstract_variables(model).get(COLLECTION, {}))


def init_router_state(model: Model) -> dict[str, Any]:
  """The collection before the first step: zeros."""
  shapes = abstract_router_state(model)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def variables(params: Any, router_state: Any) -> dict[str, Any]:
  """The variables that `apply` takes, without an empty collection."""
  collections = {COLLECTION: router_state} if router_state else {}
  return {'params': params, **collections}
