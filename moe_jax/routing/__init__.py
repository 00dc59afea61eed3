"""Rules of routing: pure functions from router logits to a `Routing`.

Functions take arrays and keys and return a `Routing`; there is no flax here.
`dispatch` moves tokens as a routing says; the routers, which have parameters,
are `moe_jax.layers.routers`.
"""

# The form `import x as x` says that the name x is public.
from moe_jax.routing import dispatch as dispatch
from moe_jax.routing.assignments import Routing as Routing
from moe_jax.routing.aux_losses import balance_loss as balance_loss
from moe_jax.routing.aux_losses import importance_loss as importance_loss
from moe_jax.routing.aux_losses import load_loss as load_loss
from moe_jax.routing.aux_losses import z_loss as z_loss
from moe_jax.routing.capacity import All as All
from moe_jax.routing.expert_choice_rule import expert_choice as expert_choice
from moe_jax.routing.given_choice_rule import GivenChoices as GivenChoices
from moe_jax.routing.given_choice_rule import even_choice as even_choice
from moe_jax.routing.given_choice_rule import given_choice as given_choice
from moe_jax.routing.given_choice_rule import one_queue as one_queue
from moe_jax.routing.given_choice_rule import to_experts as to_experts
from moe_jax.routing.rules_without_logits import hash_choice as hash_choice
from moe_jax.routing.rules_without_logits import random_choice as random_choice
from moe_jax.routing.shazeer_rules import NoisyLogits as NoisyLogits
from moe_jax.routing.shazeer_rules import load_probability as load_probability
from moe_jax.routing.shazeer_rules import noisy_logits as noisy_logits
from moe_jax.routing.soft_rule import AnyRouting as AnyRouting
from moe_jax.routing.stats import ExchangeStats as ExchangeStats
from moe_jax.routing.stats import MoeAux as MoeAux
from moe_jax.routing.stats import drop_rate as drop_rate
from moe_jax.routing.stats import empty_aux as empty_aux
from moe_jax.routing.stats import no_exchange as no_exchange
from moe_jax.routing.stats import routing_stats as routing_stats
from moe_jax.routing.token_choice_rule import SLOT_PRIORITIES as SLOT_PRIORITIES
from moe_jax.routing.token_choice_rule import choice_gates as choice_gates
from moe_jax.routing.token_choice_rule import choice_slots as choice_slots
from moe_jax.routing.token_choice_rule import choose as choose
from moe_jax.routing.token_choice_rule import token_choice as token_choice
