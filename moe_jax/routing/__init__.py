"""Who goes where: pure functions from router logits to a `Routing`.

Arrays and keys in, a `Routing` out; no flax, no config. How the tokens then
move is `moe_jax.dispatch`.
"""

from moe_jax.routing import (
  balance_bias,
  hash_rule,
  hierarchical_rule,
  running_totals,
  strictly_balanced_rule,
  transformers_nllb,
)
from moe_jax.routing.assignments import (
  CAPACITY_RULES,
  CapacityRule,
  Routing,
  SlotRouting,
  is_causal,
)
from moe_jax.routing.aux_losses import (
  balance_loss,
  importance_loss,
  load_loss,
  z_loss,
)
from moe_jax.routing.expert_choice_rule import expert_choice
from moe_jax.routing.hash_rule import hash_choice
from moe_jax.routing.noisy_top_k_rule import (
  NoisyLogits,
  load_probability,
  noisy_logits,
)
from moe_jax.routing.random_rule import random_choice
from moe_jax.routing.stats import (
  MoeAux,
  RoutingStats,
  empty_aux,
  mixture_stats,
  routing_stats,
  slot_stats,
)
from moe_jax.routing.token_choice_rule import (
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
  'hash_rule',
  'hierarchical_rule',
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
  'strictly_balanced_rule',
  'token_choice',
  'transformers_nllb',
  'z_loss',
]
