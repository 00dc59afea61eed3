"""The loss that is minimised: a model's own loss, and weighted router losses.

Sums are divided by normalisers of the whole batch, taken before it is split
into microbatches, so that their number changes nothing. The weights of the
auxiliary losses are options of routers; a schedule multiplies them by a factor
of the step. A new schedule is one class with its options and its factor.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Kinds, Options, fields_of, option, required, unknown
from moe_jax.layers.routers import ROUTERS
from moe_jax.models import Model
from moe_jax.models.base import TokenLosses
from moe_jax.routing import MoeAux
from moe_jax.runs.summary import Batch, LossSums
from moe_jax.shapes import Array, Float32, Leaf

_LOGITS = 'logits_z'  # the name of the loss of the logits
# The names of the losses of built-in routers, which a model may lack.
_FIELDS = {f for r in ROUTERS.builtin.values() for f in fields_of(r)}
_BUILTIN = tuple(
  sorted(f.removesuffix('_weight') for f in _FIELDS if f.endswith('_weight'))
)


class Normalizers(NamedTuple):
  """Divisors of the sums over a batch, none of them zero.

  Attributes:
    weight: float32 [], sum of loss weights.
    tokens: float32 [L], number of tokens that each layer's router routes, at
      least 1.
  """

  weight: Array
  tokens: Array


@dataclasses.dataclass(frozen=True)
class LossWeights:
  """Coefficients of the losses that are added to the cross-entropy.

  Attributes:
    routers: Coefficients of the routers' losses by the loss's name, such as
      'balance_loss': numbers, or scalar arrays, which are arguments of the
      compiled step instead of constants.
    logits_z: Coefficient of the mean squared logsumexp of the output logits
      (the z-loss of T5, which ST-MoE has beside its router z-loss); a number or
      a scalar array, too.
    num_averaged: Number by which the sum of the routers' losses over layers is
      divided: 1 adds layers (Switch), the number of sparse layers averages them
      (flaxformer).
  """

  routers: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)
  logits_z: Leaf = 0.0
  num_averaged: int = 1


def loss_weights(model: Model, logits_z: float = 0.0) -> LossWeights:
  """The coefficients of a model's losses besides the cross-entropy.

  Those of routers are from their options; `logits_z` is that of the z-loss of
  the output logits.
  """
  stacks, moe = model.stacks, model.stacks.moe
  mean = moe is not None and moe.layer_reduce == 'mean'
  num_averaged = len(stacks.mixtures) if mean else 1
  return LossWeights(stacks.loss_weights(), logits_z, num_averaged)


def normalizers(model: Model, batch: Batch) -> Normalizers:
  """The divisors of a batch's summed losses: loss weight and routed tokens.

  `batch` is a whole batch, before it is split into microbatches.
  """
  weight = jnp.maximum(batch['loss_weights'].sum(), 1e-9)
  return Normalizers(weight, model.stacks.routed_tokens(batch))


def loss_sums(losses: TokenLosses, batch: Batch, aux: MoeAux) -> LossSums:
  """The sums of losses and statistics over one batch or microbatch.

  Args:
    losses: The losses of the tokens, which are multiplied by loss weights.
    batch: The batch or microbatch, for its loss weights.
    aux: The sums of the routers' losses and statistics, which are not changed.
  """
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
  """The weighted sum of the routers' losses, each per token that is routed.

  The sum is over losses and layers, divided by `weights.num_averaged`. Losses
  of weight 0 are left out. `aux` has sums over tokens for each layer, and
  `divisors` the numbers of these tokens.
  """
  total = jnp.zeros((), jnp.float32)
  for loss, weight in weights.routers.items():
    if _counts(weight):
      total = total + weight * (aux.losses[loss] / divisors.tokens).sum()
  return total / weights.num_averaged


def _counts(weight: Leaf) -> bool:
  """Whether a loss is computed: its weight is an array, or a number but 0."""
  return isinstance(weight, jax.Array) or bool(weight)


def total_loss(
  sums: LossSums, divisors: Normalizers, weights: LossWeights
) -> Float32[Array, '']:
  """The part of a batch's loss that the batch or a microbatch contributes.

  `sums` are of the batch or microbatch, `divisors` always of the whole batch,
  so that the results of its microbatches add up to its loss.
  """
  total = sums.cross_entropy / divisors.weight
  if _counts(weights.logits_z):
    total = total + weights.logits_z * sums.logits_z / divisors.weight
  return total + aux_loss(sums.aux, divisors, weights)


@dataclasses.dataclass(frozen=True)
class AuxSchedule(Options):
  """The base of schedules of auxiliary losses, which override `factor_at`."""

  losses: tuple[str, ...] = option(
    _BUILTIN,
    'Names of the auxiliary losses whose weights are multiplied by the '
    "schedule's factor, such as 'balance' for the loss of balance_weight. All "
    "names of built-in routers, the default, stand for a user's own losses, "
    "too. 'logits_z' is the loss of logits_z_weight. An empty tuple changes no "
    'weight.',
  )
  factor: float = option(
    1.0,
    'Factor of the weights of the auxiliary losses at the first step; 0 leaves '
    'these losses out.',
    minimum=0,
  )

  @required
  def factor_at(self, step: Leaf) -> Leaf:
    """Returns the factor by which a step multiplies the losses' weights.

    A factor that never changes is a Python number: where it is 0, losses are
    not computed.

    Args:
      step: int32 [], the number of optimizer steps taken.
    """
    raise NotImplementedError

  def weights(self, weights: LossWeights, step: Leaf) -> LossWeights:
    """Returns the weights of the losses after `step` optimizer steps.

    They are `weights`, multiplied by the factor of the step if the schedule
    names the loss.
    """
    factor = self.factor_at(step)

    def changed(loss, weight):
      if not self._has(loss):
        return weight
      # The weight is the Python number 0 where the loss is not computed.
      return factor * weight if _counts(factor) and _counts(weight) else 0.0

    logits_z = changed(_LOGITS, weights.logits_z)
    routers = {loss: changed(loss, w) for loss, w in weights.routers.items()}
    return dataclasses.replace(weights, routers=routers, logits_z=logits_z)

  def check(self, weights: LossWeights) -> None:
    """Raises ValueError if the schedule names a loss that does not exist.

    The losses that exist are those of the model, which `weights` names, and of
    built-in routers.
    """
    own_names = (loss.removesuffix('_loss') for loss in weights.routers)
    names = {_LOGITS, *_BUILTIN, *own_names}
    for name in self.losses:
      if name not in names:
        raise unknown('loss in aux_losses.losses', name, names)

  def _has(self, loss: str) -> bool:
    stands_for_all = loss != _LOGITS and set(_BUILTIN) <= set(self.losses)
    return stands_for_all or loss.removesuffix('_loss') in self.losses


@dataclasses.dataclass(frozen=True)
class Constant(AuxSchedule):
  """A factor that no step changes: 1 keeps losses' weights, 0 makes them 0."""

  def factor_at(self, step: Leaf) -> Leaf:
    return self.factor


@dataclasses.dataclass(frozen=True)
class Linear(AuxSchedule):
  """A factor that changes in a straight line from a first to a final value.

  Before and after the line the factor keeps these values.
  """

  final_factor: float = option(
    0.0,
    'Factor of the weights of the auxiliary losses at the end of the line and '
    'after it; with 0 the line switches these losses off.',
    minimum=0,
  )
  start_step: int = option(
    0,
    'Number of optimizer steps that are taken with the first factor before the '
    'line begins; 0 begins at once.',
    minimum=0,
  )
  line_steps: int = option(
    1000,
    'Number of optimizer steps over which the factor changes linearly.',
    minimum=1,
  )

  def factor_at(self, step: Leaf) -> Leaf:
    if self.factor == self.final_factor:
      return self.factor
    fraction = jnp.clip((step - self.start_step) / self.line_steps, 0.0, 1.0)
    return self.factor + (self.final_factor - self.factor) * fraction


AUX_SCHEDULES = Kinds(
  'schedule of auxiliary losses',
  AuxSchedule,
  {'constant': Constant, 'linear': Linear},
  inline=True,
)
