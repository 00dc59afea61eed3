"""Rules of routing: pure functions from router logits to a `Routing`.

Functions take arrays and keys and return a `Routing`; there is no flax here.
`dispatch` moves tokens as a routing says; the routers, which have parameters,
are `moe_jax.layers.routers`.
"""

from moe_jax.routing import (
  balance_bias,
  dispatch,
  expert_groups_rule,
  hash_rule,
  hierarchical_rule,
  sparse_mixer_rule,
  strictly_balanced_rule,
  topology_rule,
)
from moe_jax.routing.assignments import Routing, SlotRouting, TokenRouting
from moe_jax.routing.aux_losses import (
  balance_loss,
  importance_loss,
  load_loss,
  z_loss,
)
from moe_jax.routing.capacity import (
  CAPACITIES,
  All,
  Capacity,
  Fixed,
  Fraction,
  PerAssignment,
  PerToken,
)
from moe_jax.routing.expert_choice_rule import expert_choice
from moe_jax.routing.given_choice_rule import (
  GivenChoices,
  even_choice,
  given_choice,
  one_queue,
  to_experts,
)
from moe_jax.routing.hash_rule import hash_choice
from moe_jax.routing.noisy_top_k_rule import (
  NoisyLogits,
  load_probability,
  noisy_logits,
)
from moe_jax.routing.random_rule import random_choice
from moe_jax.routing.soft_rule import (
  AnyRouting,
  SoftRouting,
  soft_routing,
)
from moe_jax.routing.stats import (
  ExchangeStats,
  MoeAux,
  RoutingStats,
  drop_rate,
  empty_aux,
  mixture_stats,
  no_exchange,
  routing_stats,
  slot_stats,
)
from moe_jax.routing.token_choice_rule import (
  GATES,
  SECOND_POLICIES,
  SLOT_PRIORITIES,
  at_choices,
  choose,
  gates_before_drop,
  token_choice,
)

__all__ = [
  'CAPACITIES',
  'GATES',
  'SECOND_POLICIES',
  'SLOT_PRIORITIES',
  'All',
  'AnyRouting',
  'Capacity',
  'ExchangeStats',
  'Fixed',
  'Fraction',
  'GivenChoices',
  'MoeAux',
  'NoisyLogits',
  'PerAssignment',
  'PerToken',
  'Routing',
  'RoutingStats',
  'SlotRouting',
  'SoftRouting',
  'TokenRouting',
  'at_choices',
  'balance_bias',
  'balance_loss',
  'choose',
  'dispatch',
  'drop_rate',
  'empty_aux',
  'even_choice',
  'expert_choice',
  'expert_groups_rule',
  'gates_before_drop',
  'given_choice',
  'hash_choice',
  'hash_rule',
  'hierarchical_rule',
  'importance_loss',
  'load_loss',
  'load_probability',
  'mixture_stats',
  'no_exchange',
  'noisy_logits',
  'one_queue',
  'random_choice',
  'routing_stats',
  'slot_stats',
  'soft_routing',
  'sparse_mixer_rule',
  'strictly_balanced_rule',
  'to_experts',
  'token_choice',
  'topology_rule',
  'z_loss',
]
