"""Sparse mixture-of-experts models in JAX.

    layer = moe_jax.MoE(
      moe_jax.MoeOptions(
        num_experts=8,
        num_selected=2,
        router=moe_jax.TokenChoice(gates='renormalized'),
        capacity=moe_jax.PerAssignment(factor=1.25),
        expert=moe_jax.FeedForwardExpert(hidden=1024),
      )
    )

`routing` says who goes where, `dispatch` moves the tokens, `layers` and
`models` are linen modules, `training` drives them from a config.
"""

from moe_jax import layers, models, routing
from moe_jax.errors import InputError
from moe_jax.layers import (
  Dropless,
  Einsum,
  FeedForward,
  FeedForwardExpert,
  FfnOptions,
  Gather,
  ModuleExpert,
  MoE,
  MoeOptions,
  Shared,
  SharedExpertOptions,
  Sorted,
)
from moe_jax.layers.routers import (
  ExpertChoice,
  Hash,
  Hierarchical,
  NoisyTopK,
  Random,
  StrictlyBalanced,
  TokenChoice,
)
from moe_jax.layers.routers.contract import Sizes
from moe_jax.routing import MoeAux, Routing, SlotRouting, dispatch
from moe_jax.routing.capacity import (
  All,
  Fixed,
  Fraction,
  PerAssignment,
  PerToken,
)

__all__ = [
  'All',
  'Dropless',
  'Einsum',
  'ExpertChoice',
  'FeedForward',
  'FeedForwardExpert',
  'FfnOptions',
  'Fixed',
  'Fraction',
  'Gather',
  'Hash',
  'Hierarchical',
  'InputError',
  'MoE',
  'ModuleExpert',
  'MoeAux',
  'MoeOptions',
  'NoisyTopK',
  'PerAssignment',
  'PerToken',
  'Random',
  'Routing',
  'Shared',
  'SharedExpertOptions',
  'Sizes',
  'SlotRouting',
  'Sorted',
  'StrictlyBalanced',
  'TokenChoice',
  'dispatch',
  'layers',
  'models',
  'routing',
]
