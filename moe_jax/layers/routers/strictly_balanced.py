"""Strictly balanced gating: every expert has as many tokens as every other.

Shazeer et al. 2017, Appendix F (https://arxiv.org/abs/1701.06538). In training
an expert takes its part of the K * S choices of a group; in inference it takes
the tokens above its learned threshold, up to the capacity. The rule is
`moe_jax.routing.shazeer_rules`.
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from moe_jax.layers import parameters
from moe_jax.layers.routers.balancing import LoadLoss, loss_weight
from moe_jax.layers.routers.by_expert import LEAK, ByExpert, slot_aux
from moe_jax.layers.routers.contract import Router
from moe_jax.layers.routers.linear_gate import (
  AXES,
  ROLE,
  jittered,
  linear_logits,
)
from moe_jax.partitioning import on_each_device
from moe_jax.routing import shazeer_rules as rules
from moe_jax.routing.aux_losses import over_groups


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
