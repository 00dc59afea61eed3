"""Rules of routing: pure functions from router logits to a `Routing`.

Functions take arrays and keys and return a `Routing`; there is no flax here.
`dispatch` moves tokens as a routing says; the routers, which have parameters,
are `moe_jax.layers.routers`.
"""

from moe_jax.routing import dispatch
from moe_jax.routing.assignments import Routing, SlotRouting, TokenRouting
from moe_jax.routing.aux_losses import (
  balance_loss,
  importance_loss,
  load_loss,
  z_loss,
)
from moe_jax.routing.capacity import All
from moe_jax.routing.expert_choice_rule import expert_choice
from moe_jax.routing.given_choice_rule import (
  GivenChoices,
  even_choice,
  given_choice,
  one_queue,
  to_experts,
)
from moe_jax.routing.rules_without_logits import hash_choice, random_choice
from moe_jax.routing.shazeer_rules import (
  NoisyLogits,
  load_probability,
  noisy_logits,
)
from moe_jax.routing.soft_rule import AnyRouting
from moe_jax.routing.stats import (
  ExchangeStats,
  MoeAux,
  drop_rate,
  empty_aux,
  mixture_stats,
  no_exchange,
  routing_stats,
  slot_stats,
)
from moe_jax.routing.token_choice_rule import (
  SLOT_PRIORITIES,
  choice_gates,
  choice_slots,
  choose,
  token_choice,
)

__all__ = [
  'SLOT_PRIORITIES',
  'All',
  'AnyRouting',
  'ExchangeStats',
  'GivenChoices',
  'MoeAux',
  'NoisyLogits',
  'Routing',
  'SlotRouting',
  'TokenRouting',
  'balance_loss',
  'choice_gates',
  'choice_slots',
  'choose',
  'dispatch',
  'drop_rate',
  'empty_aux',
  'even_choice',
  'expert_choice',
  'given_choice',
  'hash_choice',
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
  'to_experts',
  'token_choice',
  'z_loss',
]
