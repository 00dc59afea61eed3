"""The loss that is minimised: a model's own loss, and weighted router losses.

Sums are divided by normalisers of the whole batch, taken before it is split
into microbatches, so that accumulation changes nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.models import Model
from moe_jax.models.base import TokenLosses
from moe_jax.routing import MoeAux
from moe_jax.runs.summary import Batch, LossSums
from moe_jax.shapes import Array, Float32, Leaf


class Normalizers(NamedTuple):
  """Divisors of the sums over a batch, none of them zero.

  Attributes:
    weight: float32 [], sum of loss weights.
    tokens: float32 [L], number of tokens that each layer's router routes.
  """

  weight: Array
  tokens: Array


@dataclasses.dataclass(frozen=True)
class LossWeights:
  """Coefficients of the losses that are added to a model's own.

  Attributes:
    routers: Coefficients of the routers' losses by name, 'balance_loss':
      numbers, or scalar arrays, which are arguments of the compiled step
      instead of constants.
    logits_z: Coefficient of the mean squared logsumexp of the output logits
      (T5's and ST-MoE's other z-loss); a number or a scalar array, too.
    num_averaged: Number by which the sum of the routers' losses over layers is
      divided: 1 adds layers (Switch), the number of sparse layers averages them
      (flaxformer).
  """

  routers: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)
  logits_z: Leaf = 0.0
  num_averaged: int = 1


def loss_weights(model: Model, logits_z: float = 0.0) -> LossWeights:
  """The coefficients of a model's routers, with `logits_z` for its logits."""
  stacks, moe = model.stacks, model.stacks.moe
  mean = moe is not None and moe.layer_reduce == 'mean'
  num_averaged = len(stacks.mixtures) if mean else 1
  return LossWeights(stacks.loss_weights(), logits_z, num_averaged)


def normalizers(model: Model, batch: Batch) -> Normalizers:
  """The normalisers of a whole batch."""
  weight = jnp.maximum(batch['loss_weights'].sum(), 1e-9)
  return Normalizers(weight, model.stacks.routed_tokens(batch))


def loss_sums(losses: TokenLosses, batch: Batch, aux: MoeAux) -> LossSums:
  """The sums of losses and statistics over one batch or microbatch."""
  weights = batch['loss_weights']

  def weighted(nats):
    return jnp.where(weights != 0, nats * weights, 0.0).sum()

  logits_z = jnp.zeros((), jnp.float32)
  if losses.logits_z is not None:
    logits_z = weighted(losses.logits_z)
  return LossSums(weighted(losses.nats), weights.sum(), logits_z, aux)


def aux_loss(
  aux: MoeAux, divisors: Normalizers, weights: LossWeights
) -> Float32[Array, '']:
  """The weighted sum of the routers' losses, without losses of weight 0."""
  total = jnp.zeros((), jnp.float32)
  for loss, weight in weights.routers.items():
    if _counts(weight):
      total = total + weight * (aux.losses[loss] / divisors.tokens).sum()
  return total / weights.num_averaged


def _counts(weight: Leaf) -> bool:
  """Whether a loss is computed: its weight is not the constant 0."""
  return isinstance(weight, jax.Array) or bool(weight)


def total_loss(
  sums: LossSums, divisors: Normalizers, weights: LossWeights
) -> Float32[Array, '']:
  """The part of the whole batch's loss that a (micro)batch contributes."""
  total = sums.cross_entropy / divisors.weight
  if _counts(weights.logits_z):
    total = total + weights.logits_z * sums.logits_z / divisors.weight
  return total + aux_loss(sums.aux, divisors, weights)
