"""What is minimised: cross-entropy and the routers' weighted losses.

Normalisers are those of the whole batch, taken before it is split into
microbatches, so that accumulation changes nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import unknown
from moe_jax.routing import MoeAux
from moe_jax.shapes import Array, Float32, Leaf
from moe_jax.training_types import LossSums

LAYER_REDUCES = ('mean', 'sum')


class Normalizers(NamedTuple):
  """What a whole batch's sums are divided by.

  Attributes:
    weight: float32 [], sum of loss weights.
    tokens: float32 [], real tokens, which a decoder's sparse layers see.
    encoder_tokens: float32 [], those that an encoder's see.
  """

  weight: Array
  tokens: Array
  encoder_tokens: Array


@dataclasses.dataclass(frozen=True)
class LossWeights:
  """Coefficients of the losses beside the cross-entropy.

  Attributes:
    balance, z, importance, load: One a router's loss; a number, or a scalar
      array, which is an argument of the step and not a constant in it.
    logits_z: Of the mean squared logsumexp of the output logits (T5's and
      ST-MoE's other z-loss).
    layer_reduce: Over sparse layers: 'sum' (Switch) or 'mean' (flaxformer).
    num_sparse: How many layers are sparse, for 'mean'.
    encoder_layers: How many layers, from the first on, are an encoder's.
  """

  balance: Leaf = 0.0
  z: Leaf = 0.0
  importance: Leaf = 0.0
  load: Leaf = 0.0
  logits_z: float = 0.0
  layer_reduce: str = 'sum'
  num_sparse: int = 1
  encoder_layers: int = 0

  def __post_init__(self):
    if self.layer_reduce not in LAYER_REDUCES:
      raise unknown('layer_reduce', self.layer_reduce, LAYER_REDUCES)


def normalizers(batch: dict[str, Array]) -> Normalizers:
  """Of a whole batch; never zero."""

  def tokens(name):
    real = (batch[name] > 0).sum() if name in batch else 0
    return jnp.maximum(jnp.asarray(real, jnp.float32), 1.0)

  weight = jnp.maximum(batch['loss_weights'].sum(), 1e-9)
  return Normalizers(
    weight, tokens('segment_ids'), tokens('encoder_segment_ids')
  )


def loss_sums(
  logits: Float32[Array, 'B T V'], batch: dict[str, Array], aux: MoeAux
) -> LossSums:
  """The sums of one (micro)batch."""
  weights = batch['loss_weights']
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['targets']
  )
  logits_z = jax.nn.logsumexp(logits, axis=-1) ** 2
  return LossSums(
    (nats * weights).sum(), weights.sum(), (logits_z * weights).sum(), aux
  )


def own_loss_sums(
  losses: Float32[Array, 'B T'], batch: dict[str, Array], aux: MoeAux
) -> LossSums:
  """The sums of a model that has a loss of its own in cross-entropy's place."""
  weights = batch['loss_weights']
  zero = jnp.zeros((), jnp.float32)
  return LossSums((losses * weights).sum(), weights.sum(), zero, aux)


def aux_loss(
  aux: MoeAux, whole: Normalizers, weights: LossWeights
) -> Float32[Array, '']:
  """The weighted routers' losses; a loss of weight 0 leaves no gradient."""
  terms = (
    (weights.balance, aux.balance_loss),
    (weights.z, aux.z_loss),
    (weights.importance, aux.importance_loss),
    (weights.load, aux.load_loss),
  )
  layers = max(weights.num_sparse, 1) if weights.layer_reduce == 'mean' else 1
  encoders = jnp.arange(len(aux.z_loss)) < weights.encoder_layers
  tokens = jnp.where(encoders, whole.encoder_tokens, whole.tokens)  # [L]
  total = jnp.zeros((), jnp.float32)
  for weight, loss in terms:
    if isinstance(weight, jax.Array) or weight:
      total = total + weight * (loss / tokens).sum()
  return total / layers


def total_loss(
  sums: LossSums, whole: Normalizers, weights: LossWeights
) -> Float32[Array, '']:
  """This (micro)batch's share of the whole batch's loss."""
  total = sums.cross_entropy / whole.weight
  if weights.logits_z:
    total = total + weights.logits_z * sums.logits_z / whole.weight
  return total + aux_loss(sums.aux, whole, weights)
