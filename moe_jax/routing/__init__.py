"""Who goes where: pure functions from router logits to a `Routing`.

Arrays and keys in, a `Routing` out; no flax, no config. How the tokens then
move is `moe_jax.dispatch`.
"""

from moe_jax.routing import (
  balance_bias,
  hashing,
  hierarchical,
  running_totals,
  strictly_balanced,
  transformers_nllb,
)
from moe_jax.routing.base import (
  CAPACITY_RULES,
  CapacityRule,
  Routing,
  SlotRouting,
  is_causal,
)
from moe_jax.routing.expert_choice import expert_choice
from moe_jax.routing.hashing import hash_choice
from moe_jax.routing.losses import (
  balance_loss,
  importance_loss,
  load_loss,
  z_loss,
)
from moe_jax.routing.noisy_top_k import (
  NoisyLogits,
  load_probability,
  noisy_logits,
)
from moe_jax.routing.random_choice import random_choice
from moe_jax.routing.stats import (
  MoeAux,
  RoutingStats,
  empty_aux,
  mixture_stats,
  routing_stats,
  slot_stats,
)
from moe_jax.routing.token_choice import (
  GATES,
  SECOND_POLICIES,
  SLOT_PRIORITIES,
  at_choices,
  check_token_choice,
  choose,
  even_choice,
  gates_before_drop,
  given_choice,
  token_choice,
)

__all__ = [
  'CAPACITY_RULES',
  'GATES',
  'SECOND_POLICIES',
  'SLOT_PRIORITIES',
  'CapacityRule',
  'MoeAux',
  'NoisyLogits',
  'Routing',
  'RoutingStats',
  'SlotRouting',
  'at_choices',
  'balance_bias',
  'balance_loss',
  'check_token_choice',
  'choose',
  'empty_aux',
  'even_choice',
  'expert_choice',
  'gates_before_drop',
  'given_choice',
  'hash_choice',
  'hashing',
  'hierarchical',
  'importance_loss',
  'is_causal',
  'load_loss',
  'load_probability',
  'mixture_stats',
  'noisy_logits',
  'random_choice',
  'routing_stats',
  'running_totals',
  'slot_stats',
  'strictly_balanced',
  'token_choice',
  'transformers_nllb',
  'z_loss',
]
