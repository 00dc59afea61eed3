"""Strictly balanced gating: every expert has as many tokens as every other.

Shazeer et al. 2017, Appendix F (https://arxiv.org/abs/1701.06538). In training
each expert takes the K * S / E tokens of a group with its largest gates; in
inference it takes those whose gate is above its learned threshold, up to the
capacity.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from moe_jax.layers import parameters
from moe_jax.layers.routers import contract, shared_options, steps
from moe_jax.partitioning import on_each_device
from moe_jax.routing import shazeer_rules as rules
from moe_jax.routing.aux_losses import over_groups


@dataclasses.dataclass(frozen=True)
class StrictlyBalanced(contract.RouterOptions):
  """The options of strictly balanced gating."""

  by_expert: ClassVar[bool] = True

  jitter: float = shared_options.JITTER
  use_bias: bool = shared_options.USE_BIAS
  z_weight: float = shared_options.Z_WEIGHT
  importance_weight: float = shared_options.IMPORTANCE_WEIGHT
  load_weight: float = shared_options.loss_weight(
    0.0,
    'loss that teaches the thresholds to agree with the choices of training '
    '(Eq. 20 of arXiv:1701.06538)',
  )

  def module(self, sizes, shared, name=None):
    return StrictlyBalancedRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    """Later tokens change earlier outputs in training.

    In inference a threshold judges each token by itself, with room for all.
    """
    return contract.Causality(steps.EXPERTS_CHOOSE)


class StrictlyBalancedRouter(contract.Router):
  """The router of strictly balanced gating, with a linear layer's logits."""

  options: StrictlyBalanced

  def route(self, x, mask, train, token_info, layer):
    x = steps.jittered(self, x, self.options.jitter, train)
    logits = steps.linear_logits(self, x, self.options.use_bias)
    E, K = self.sizes.num_experts, self.sizes.num_selected
    capacity = self.sizes.slots(x.shape[1])
    # Before training the gates are uniform, and so are the thresholds.
    init, axes = nn.initializers.constant(1 / E), steps.AXES[1:]
    init = parameters.boxed(init, axes, role=steps.ROLE, form='bias')
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
    aux = steps.slot_aux(self, chosen, logits, mask)
    # Loads are even without a loss; here 'load_loss' is the thresholds' loss.
    aux.losses['load_loss'] = over_groups(loss, mask)
    return chosen, aux
