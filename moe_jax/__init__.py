"""Sparse mixture-of-experts models in JAX.

    layer = moe_jax.MoE(moe_jax.MoeConfig(
      router=moe_jax.RouterConfig(num_experts=8, num_selected=2),
      expert=moe_jax.FfnConfig(hidden=1024)))

`routing` says who goes where, `dispatch` moves the tokens, `layers` and
`models` are linen modules, `training` drives them from a config.
"""

from moe_jax import dispatch, layers, models, routing
from moe_jax.layers import (
  Experts,
  FeedForward,
  FfnConfig,
  MoE,
  MoeConfig,
  Router,
  RouterConfig,
)
from moe_jax.routing import CapacityRule, MoeAux, Routing, SlotRouting

__all__ = [
  'CapacityRule',
  'Experts',
  'FeedForward',
  'FfnConfig',
  'MoE',
  'MoeAux',
  'MoeConfig',
  'Router',
  'RouterConfig',
  'Routing',
  'SlotRouting',
  'dispatch',
  'layers',
  'models',
  'routing',
]
