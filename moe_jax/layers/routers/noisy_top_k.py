"""Noisy top-K gating: the logits have noise whose size is learned.

Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, section 2.1. Both kernels
start at zero. The rule is `moe_jax.routing.shazeer_rules`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from moe_jax import routing
from moe_jax.layers import parameters
from moe_jax.layers.routers.balancing import (
  BalanceLoss,
  ImportanceLoss,
  LoadLoss,
  ZLoss,
)
from moe_jax.layers.routers.by_token import (
  ByLogits,
  gates_of,
  logits_aux,
  serve,
)
from moe_jax.layers.routers.contract import NOISE, SOWN, Router
from moe_jax.layers.routers.linear_gate import (
  AXES,
  ROLE,
  LinearGate,
  jittered,
  linear_logits,
  product,
)
from moe_jax.routing.aux_losses import over_groups

# The name in 'intermediates' of Load [G, E]: by expert, the sum of the chances
# that a token chooses it if only its own noise is redrawn (Eq. 10).
LOAD = 'load'


@dataclasses.dataclass(frozen=True)
class NoisyTopK(
  LoadLoss, ImportanceLoss, ZLoss, BalanceLoss, LinearGate, ByLogits
):
  """The options of noisy top-K gating; the paper's gates are renormalised."""

  takes_choices: ClassVar[bool] = True

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return NoisyTopKRouter(self, sizes, shared, name=name)

  def multiply_adds(self, sizes, width):
    """The multiplications with two kernels, of the logits and of the noise."""
    return 2 * super().multiply_adds(sizes, width)


class NoisyTopKRouter(Router):
  """Two linear layers, noise, then token choice; see `Router`."""

  options: NoisyTopK

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del router_ids, layer
    x, zeros = jittered(self, x, train), parameters.zero_kernel(AXES, role=ROLE)
    clean = linear_logits(self, x, zeros)
    std = product(self, 'w_noise', zeros, x, self.sizes.num_experts)
    key = self.make_rng(NOISE) if train else None
    logits = routing.noisy_logits(clean, std, key)
    chosen, largest = serve(
      self, logits.noisy, mask, train, spare=1, given=given
    )
    gate = gates_of(self, logits.noisy, chosen)
    aux = logits_aux(self, chosen, clean, gate, mask)
    K = self.sizes.num_selected
    probability = routing.load_probability(logits, K, largest)
    load = routing.load_loss(probability, mask)
    aux.losses['load_loss'] = over_groups(load, mask)
    # Load is sown for analysis alone; it is kept if the caller makes
    # 'intermediates' mutable.
    real = mask[..., None]
    self.sow(SOWN, LOAD, jnp.where(real, probability, 0.0).sum(1))  # [G, E]
    return chosen, aux
