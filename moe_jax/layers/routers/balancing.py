"""Options that keep loads even: weights of losses, and a bias without a loss.

Each class is a part of the options of the routers that have it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import option
from moe_jax.layers.routers.contract import (
  ROUTER_STATE,
  Router,
  RouterOptions,
)
from moe_jax.routing import balance_bias
from moe_jax.routing.aux_losses import BALANCE_CHOICES
from moe_jax.shapes import Array, Float32

PUBLISHED_RATE = 0.001  # of Loss-Free Balancing and DeepSeek-V3
_BIAS = 'balance_bias'


def loss_weight(default: float, loss: str) -> Any:
  """A field for the weight of a loss, which `loss` describes."""
  sentence = f'Weight of the {loss}; 0.0 leaves it out.'
  return option(
    default,
    sentence,
    minimum=0,
    same_function=True,
  )


@dataclasses.dataclass(frozen=True)
class BalanceLoss(RouterOptions):
  """The options of a router with the balance loss of Switch and GShard."""

  balance_weight: float = loss_weight(
    0.01,
    'balance loss, E times the sum over experts of their fraction of choices '
    'times their mean probability (Eq. 4 of arXiv:2101.03961)',
  )
  balance_choices: str = option(
    'all',
    "Choices of a token that the balance loss counts: 'all' K of them, or only "
    "the 'first' (GShard, ST-MoE).",
    choices=BALANCE_CHOICES,
    same_function=True,
  )

  def balance_probs(
    self, logits: Float32[Array, '*G E']
  ) -> Float32[Array, '*G E']:
    """The probabilities whose means the balance loss multiplies with loads."""
    return jax.nn.softmax(logits)


@dataclasses.dataclass(frozen=True)
class ZLoss(RouterOptions):
  """The options of a router with ST-MoE's z-loss."""

  z_weight: float = loss_weight(
    0.001,
    'z-loss, the mean squared logsumexp of the router logits (Eq. 5 of '
    'arXiv:2202.08906)',
  )


@dataclasses.dataclass(frozen=True)
class ImportanceLoss(RouterOptions):
  """The options of a router with the importance loss of Shazeer et al."""

  importance_weight: float = loss_weight(
    0.0,
    'importance loss, the squared coefficient of variation of the summed gates '
    'of each expert (Eq. 6-7 of arXiv:1701.06538)',
  )


@dataclasses.dataclass(frozen=True)
class LoadLoss(RouterOptions):
  """The options of a router with the load loss of Shazeer et al."""

  load_weight: float = loss_weight(
    0.0,
    "load loss, the squared coefficient of variation of the experts' expected "
    "loads under the router's noise (Eq. 10-11 of arXiv:1701.06538)",
  )


@dataclasses.dataclass(frozen=True)
class BalanceBias(RouterOptions):
  """The options of a router with the bias of Loss-Free Balancing."""

  balance_bias_rate: float = option(
    0.0,
    "Amount by which each step changes an expert's balancing bias, which evens "
    'loads without a loss (Algorithm 1 of arXiv:2408.15664, 0.001 there; '
    'usually with balance_weight=0.0); 0.0: there is no bias.',
    minimum=0,
    below=1,
  )
  balance_bias_rule: str = option(
    'sign',
    "Rule by which a step changes the balancing bias: 'sign' by the rate, up "
    'below the mean load and down above it (Algorithm 1 of arXiv:2408.15664); '
    "'error' by the rate times (mean load - load) / mean load (Table 3 there).",
    choices=balance_bias.RULES,
    same_function=True,
  )

  @property
  def keeps_state(self):
    """Whether there is a bias."""
    return self.balance_bias_rate > 0

  def problems(self):
    """The problem of a rule for a bias that there is not."""
    yield from super().problems()
    if not self.keeps_state:
      reason = 'unless balance_bias_rate is above 0'
      yield from self.in_vain(reason, 'balance_bias_rule')

  def canonical(self, sizes):
    """The router with one rate: others move the bias otherwise, in training."""
    router = super().canonical(sizes)
    if not self.keeps_state:
      return router
    return dataclasses.replace(router, balance_bias_rate=PUBLISHED_RATE)

  def move_state(self, state, load, rate=None):
    """The bias after a step; see `routing.balance_bias.moved`."""
    if rate is None:
      rate = self.balance_bias_rate
    bias = state[_BIAS]
    router_load = load[..., : bias.shape[-1]]
    rule = self.balance_bias_rule
    return {_BIAS: balance_bias.moved(bias, router_load, rate, rule)}


def bias_of(module: Router) -> Float32[Array, ' E'] | None:
  """The module's balancing bias; None where it has none."""
  if not module.options.keeps_state:
    return None
  shape = (module.sizes.num_experts,)
  bias = module.variable(ROUTER_STATE, _BIAS, jnp.zeros, shape, jnp.float32)
  return bias.value
