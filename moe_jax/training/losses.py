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
from moe_jax.shapes import Array, Float32

LAYER_REDUCES = ('mean', 'sum')


class LossSums(NamedTuple):
  """Sums over tokens; add two to merge them.

  Attributes:
    cross_entropy: float32 [], sum of nats times loss weights.
    weight: float32 [], sum of loss weights.
    aux: The layers' aux, every leaf [L, ...].
  """

  cross_entropy: Array
  weight: Array
  aux: MoeAux


class Normalizers(NamedTuple):
  """What a whole batch's sums are divided by.

  Attributes:
    weight: float32 [], sum of loss weights.
    tokens: float32 [], real tokens, which every sparse layer sees.
  """

  weight: Array
  tokens: Array


@dataclasses.dataclass(frozen=True)
class LossWeights:
  """Coefficients of the routers' losses.

  Attributes:
    balance, z, importance, load: One a loss.
    layer_reduce: Over sparse layers: 'sum' (Switch) or 'mean' (flaxformer).
    num_sparse: How many layers are sparse, for 'mean'.
  """

  balance: float = 0.0
  z: float = 0.0
  importance: float = 0.0
  load: float = 0.0
  layer_reduce: str = 'sum'
  num_sparse: int = 1

  def __post_init__(self):
    if self.layer_reduce not in LAYER_REDUCES:
      raise unknown('layer_reduce', self.layer_reduce, LAYER_REDUCES)


def normalizers(batch: dict[str, Array]) -> Normalizers:
  """Of a whole batch; never zero."""
  tokens = (batch['segment_ids'] > 0).sum().astype(jnp.float32)
  weight = batch['loss_weights'].sum()
  return Normalizers(jnp.maximum(weight, 1e-9), jnp.maximum(tokens, 1.0))


def loss_sums(
  logits: Float32[Array, 'B T V'], batch: dict[str, Array], aux: MoeAux
) -> LossSums:
  """The sums of one (micro)batch."""
  weights = batch['loss_weights']
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['targets']
  )
  return LossSums((nats * weights).sum(), weights.sum(), aux)


def aux_loss(
  aux: MoeAux, tokens: Float32[Array, ''], weights: LossWeights
) -> Float32[Array, '']:
  """The weighted routers' losses; a loss of weight 0 leaves no gradient."""
  terms = (
    (weights.balance, aux.balance_loss),
    (weights.z, aux.z_loss),
    (weights.importance, aux.importance_loss),
    (weights.load, aux.load_loss),
  )
  layers = max(weights.num_sparse, 1) if weights.layer_reduce == 'mean' else 1
  total = jnp.zeros((), jnp.float32)
  for weight, loss in terms:
    if weight:
      total = total + weight * loss.sum()
  return total / (tokens * layers)


def total_loss(
  sums: LossSums, whole: Normalizers, weights: LossWeights
) -> Float32[Array, '']:
  """This (micro)batch's share of the whole batch's loss."""
  mean_nats = sums.cross_entropy / whole.weight
  return mean_nats + aux_loss(sums.aux, whole.tokens, weights)


def add(a: LossSums, b: LossSums) -> LossSums:
  """Merges two sums."""
  return jax.tree.map(lambda x, y: x + y, a, b)
