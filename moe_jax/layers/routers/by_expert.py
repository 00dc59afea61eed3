"""Routers in which experts choose tokens.

Expert choice (https://arxiv.org/abs/2202.09368): each expert picks the tokens
it wants most. The capacity is the number of tokens that an expert takes; with
room for all, every expert takes every token.

Strictly balanced gating (Shazeer et al. 2017, Appendix F,
https://arxiv.org/abs/1701.06538): every expert has as many tokens as every
other. In training an expert takes its part of the K * S choices of a group; in
inference it takes the tokens above its learned threshold, up to the capacity.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from moe_jax import routing
from moe_jax.layers import parameters
from moe_jax.layers.routers.balancing import (
  ImportanceLoss,
  LoadLoss,
  ZLoss,
  loss_weight,
)
from moe_jax.layers.routers.contract import LOGITS, SOWN, Router
from moe_jax.layers.routers.linear_gate import (
  AXES,
  ROLE,
  LinearGate,
  jittered,
  linear_logits,
)
from moe_jax.partitioning import on_each_device
from moe_jax.routing import shazeer_rules as rules
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
  chosen: routing.Routing,
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
    stats=routing.routing_stats(chosen, logits, mask, K),
  )


@dataclasses.dataclass(frozen=True)
class ExpertChoice(ByExpert):
  """The options of expert choice."""

  takes_choices: ClassVar[bool] = True

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return ExpertChoiceRouter(self, sizes, shared, name=name)

  def leak(self, sizes):
    """A leak, as picks depend on all tokens, unless every token is picked."""
    return LEAK if sizes.capacity.binds else None

  def decodes(self, sizes):
    """None with room for all; else experts need several tokens to choose."""
    if not sizes.capacity.binds:
      return None
    return (
      'expert choice does not decode token by token: its experts choose among '
      "a group's tokens; evaluate the model by its loss, or train one with "
      'another router'
    )

  def serving_all(self, sizes):
    """None: experts choose as in training, as room for all is another model."""
    return None


class ExpertChoiceRouter(Router):
  """A linear layer, then expert choice; see `Router`."""

  options: ExpertChoice

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del router_ids, layer
    logits = linear_logits(self, jittered(self, x, train))
    capacity = self.sizes.slots(x.shape[1])

    def choose(logits, mask, may_take):
      return routing.expert_choice(
        logits, capacity=capacity, mask=mask, taken_by=may_take
      )

    may_take = taken_by(given, self.sizes.num_experts)
    chosen = on_each_device(choose, (logits, mask, may_take))
    return chosen, slot_aux(self, chosen, logits, mask)


@dataclasses.dataclass(frozen=True)
class StrictlyBalanced(LoadLoss, ByExpert):
  """The options of strictly balanced gating."""

  load_weight: float = loss_weight(
    0.0,
    'loss that teaches the thresholds to agree with the choices of training '
    '(Eq. 20 of arXiv:1701.06538)',
  )

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return StrictlyBalancedRouter(self, sizes, shared, name=name)

  def leak(self, sizes):
    """A leak: in training an expert chooses among all tokens of the group."""
    return LEAK

  def training_slots(self, sizes, group_size):
    """An even share of all choices, which experts take in training."""
    return -(-sizes.num_selected * group_size // sizes.num_experts)


class StrictlyBalancedRouter(Router):
  """A linear layer, then strictly balanced gating; see `Router`."""

  options: StrictlyBalanced

  def route(self, x, mask, train, router_ids, layer):
    """Routes each group by itself; see `Router`."""
    del router_ids, layer
    logits = linear_logits(self, jittered(self, x, train))
    E, K = self.sizes.num_experts, self.sizes.num_selected
    capacity = self.sizes.slots(x.shape[1])
    # Before training the gates are uniform, and so are the thresholds.
    init = parameters.boxed(
      nn.initializers.constant(1 / E), AXES[1:], role=ROLE, form='bias'
    )
    thresholds = self.param('b_threshold', init, (E,), jnp.float32)

    def choose(logits, mask, thresholds):
      trained = rules.batchwise_choice(logits, num_selected=K, mask=mask)
      loss = rules.batchwise_loss(logits, thresholds, trained, mask)
      if train:
        return trained, loss
      chosen = rules.threshold_choice(
        logits, thresholds, capacity=capacity, mask=mask
      )
      return chosen, loss

    chosen, loss = on_each_device(
      choose, (logits, mask), (thresholds,), (PartitionSpec(),)
    )
    aux = slot_aux(self, chosen, logits, mask)
    # The load needs no loss; this is that of the thresholds.
    aux.losses['load_loss'] = over_groups(loss, mask)
    return chosen, aux
