"""Noisy top-K gating: the logits have noise whose size is learned.

Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, section 2.1. The kernels
of the logits and of their noise start at zero. The rule is
`moe_jax.routing.shazeer_rules`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from moe_jax import routing
from moe_jax.layers import parameters
from moe_jax.layers.routers import contract, shared_options, steps
from moe_jax.routing.aux_losses import over_groups

# The name in 'intermediates' of expected loads [G, E]: sums over tokens of the
# probability to choose an expert if its noise alone is drawn again (Eq. 10).
LOAD = 'load'


@dataclasses.dataclass(frozen=True)
class NoisyTopK(contract.RouterOptions):
  """The options of noisy top-K gating; arXiv:1701.06538 renormalises gates."""

  takes_choices: ClassVar[bool] = True
  has_columns: ClassVar[bool] = True

  second_policy: str = shared_options.SECOND_POLICY
  gates: str = shared_options.GATES
  slot_priority: str = shared_options.SLOT_PRIORITY
  second_threshold: float = shared_options.SECOND_THRESHOLD
  jitter: float = shared_options.JITTER
  use_bias: bool = shared_options.USE_BIAS
  balance_weight: float = shared_options.BALANCE_WEIGHT
  balance_choices: str = shared_options.BALANCE_CHOICES
  z_weight: float = shared_options.Z_WEIGHT
  importance_weight: float = shared_options.IMPORTANCE_WEIGHT
  load_weight: float = shared_options.loss_weight(
    0.0,
    "load loss, the squared coefficient of variation of the experts' expected "
    "loads under the router's noise (Eq. 10-11 of arXiv:1701.06538)",
  )

  def problems(self):
    return steps.threshold_problems(self)

  def problems_with(self, sizes):
    return steps.gate_problems(sizes, self.gates, self.second_policy)

  def module(self, sizes, shared, name=None):
    return NoisyTopKRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return contract.Causality.of_queues(sizes, self.slot_priority)


class NoisyTopKRouter(contract.Router):
  """The router of two linear layers, for logits and for their noise.

  Tokens choose by the noisy logits.
  """

  options: NoisyTopK

  def route(self, x, mask, train, token_info, layer, given=None):
    o, sizes = self.options, self.sizes
    E, K = sizes.num_experts, sizes.num_selected
    x = steps.jittered(self, x, o.jitter, train)
    zeros = parameters.zero_kernel(steps.AXES, role=steps.ROLE)
    clean = steps.linear_logits(self, x, o.use_bias, zeros)
    std = steps.product(self, 'w_noise', zeros, x, E)
    key = self.make_rng(contract.NOISE) if train else None
    logits = routing.noisy_logits(clean, std, key)
    # The load of an expert also depends on the best expert that is not chosen.
    best = steps.largest(logits.noisy, min(K + 1, E))
    queue = steps.queue_options(self, train)
    chosen, aux = steps.with_linear_gates(
      self, logits.noisy, best[..., :K], mask, given, clean, **queue
    )
    probability = routing.load_probability(logits, K, best)
    load = routing.load_loss(probability, mask)
    aux.losses['load_loss'] = over_groups(load, mask)
    load = jnp.where(mask[..., None], probability, 0.0).sum(1)  # [G, E]
    self.sow(contract.SOWN, LOAD, load)  # for analysis alone
    return chosen, aux
