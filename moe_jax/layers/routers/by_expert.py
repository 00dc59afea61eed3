"""Options and losses of routers in which experts choose tokens."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax import routing
from moe_jax.layers.routers.balancing import ImportanceLoss, ZLoss
from moe_jax.layers.routers.contract import LOGITS, SOWN, Router
from moe_jax.layers.routers.linear_gate import LinearGate
from moe_jax.routing.aux_losses import cv_squared, over_groups
from moe_jax.routing.given_choice_rule import OPEN, GivenChoices
from moe_jax.shapes import Array, Bool, Float32

LEAK = (
  'an expert chooses among all tokens of a group, which lets later tokens '
  'change earlier outputs; use another router'
)


@dataclasses.dataclass(frozen=True)
class ByExpert(ImportanceLoss, ZLoss, LinearGate):
  """The options of a router whose experts choose among a group's tokens."""

  by_expert: ClassVar[bool] = True

  def takes_balanced(self, sizes):
    """The reason why there is nothing to balance."""
    del sizes
    return (
      f'the experts of {type(self).__name__} choose tokens, equally many each'
    )

  def drops(self, sizes):
    """False: experts choose no more tokens than they have room for."""
    return False


def taken_by(
  given: GivenChoices | None, num_experts: int
) -> Bool[Array, 'G S E'] | None:
  """Whether each expert may take each token; None where it may take all.

  In the choices that are imposed, an expert takes all that it may.
  """
  if given is None:
    return None
  chosen = jax.nn.one_hot(given.expert, num_experts, dtype=jnp.bool_)
  return chosen.any(2) | (given.expert == OPEN).all(2, keepdims=True)


def slot_aux(
  module: Router,
  chosen: routing.SlotRouting,
  logits: Float32[Array, 'G S E'],
  mask: Bool[Array, 'G S'],
) -> routing.MoeAux:
  """The losses and statistics of `ByExpert`, sums over real tokens."""
  E, K = module.sizes.num_experts, module.sizes.num_selected
  # For analysis alone, if the caller makes 'intermediates' mutable.
  module.sow(SOWN, 'slots', chosen)
  module.sow(SOWN, LOGITS, logits)
  importance = cv_squared(chosen.gate.sum(-1))
  return routing.empty_aux(E, K)._replace(
    losses={
      'z_loss': over_groups(routing.z_loss(logits, mask), mask),
      'importance_loss': over_groups(importance, mask),
    },
    stats=routing.slot_stats(chosen, logits, mask, K),
  )
