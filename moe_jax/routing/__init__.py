"""Who goes where: pure functions from router logits to a `Routing`.

Arrays and keys in, a `Routing` out; no flax, no config. How the tokens then
move is `moe_jax.dispatch`.
"""

from moe_jax.routing import balance_bias, transformers_nllb
from moe_jax.routing.base import (
  CAPACITY_RULES,
  CapacityRule,
  Routing,
  is_causal,
)
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
from moe_jax.routing.stats import (
  MoeAux,
  RoutingStats,
  empty_aux,
  routing_stats,
)
from moe_jax.routing.token_choice import (
  GATES,
  SECOND_POLICIES,
  SLOT_PRIORITIES,
  at_choices,
  check_token_choice,
  choose,
  gates_before_drop,
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
  'at_choices',
  'balance_bias',
  'balance_loss',
  'check_token_choice',
  'choose',
  'empty_aux',
  'gates_before_drop',
  'importance_loss',
  'is_causal',
  'load_loss',
  'load_probability',
  'noisy_logits',
  'routing_stats',
  'token_choice',
  'transformers_nllb',
  'z_loss',
]
