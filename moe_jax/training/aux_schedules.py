"""Schedules of the auxiliary losses: a factor of their weights by the step.

The weights themselves are options of routers. A new schedule is one class with
its options and its factor.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.config import Kinds, Options, fields_of, option, required, unknown
from moe_jax.layers.routers import ROUTERS
from moe_jax.shapes import Leaf
from moe_jax.training.losses import LossWeights

_LOGITS = 'logits_z'  # the name of the loss of the logits
# The names of the losses of built-in routers, which a model may lack.
_FIELDS = {f for r in ROUTERS.builtin.values() for f in fields_of(r)}
_BUILTIN = tuple(
  sorted(f.removesuffix('_weight') for f in _FIELDS if f.endswith('_weight'))
)


@dataclasses.dataclass(frozen=True)
class AuxSchedule(Options):
  """The contract of schedules of the auxiliary losses.

  A subclass overrides `factor_at`.
  """

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
    """Returns the factor of the weights.

    A factor that never changes is a Python number: where it is 0, losses are
    not computed.

    Args:
      step: int32 [], the number of optimizer steps taken.
    """
    raise NotImplementedError

  def weights(self, weights: LossWeights, step: Leaf) -> LossWeights:
    """Returns the weights of the losses after `step` optimizer steps."""
    factor = self.factor_at(step)
    routers = {
      loss: _product(factor, weight) if self._has(loss) else weight
      for loss, weight in weights.routers.items()
    }
    logits_z = weights.logits_z
    if _LOGITS in self.losses:
      logits_z = _product(factor, logits_z)
    return dataclasses.replace(weights, routers=routers, logits_z=logits_z)

  def check(self, weights: LossWeights) -> None:
    """Raises ValueError for a loss that the model and built-in routers lack."""
    names = {_LOGITS, *_BUILTIN, *map(_name_of, weights.routers)}
    for name in self.losses:
      if name not in names:
        raise unknown('loss in aux_losses.losses', name, names)

  def changes(self, weights: LossWeights) -> bool:
    """Whether a loss of the schedule has a weight that is a number above 0."""
    if _LOGITS in self.losses and weights.logits_z:
      return True
    return any(w for loss, w in weights.routers.items() if self._has(loss))

  def _has(self, loss: str) -> bool:
    return _name_of(loss) in self.losses or set(_BUILTIN) <= set(self.losses)


def _name_of(loss: str) -> str:
  return loss.removesuffix('_loss')


def _product(a: Leaf, b: Leaf) -> Leaf:
  """The product of two numbers; the Python number 0 if one of them is it."""
  if any(not isinstance(x, jax.Array) and x == 0 for x in (a, b)):
    return 0.0
  return a * b


@dataclasses.dataclass(frozen=True)
class Constant(AuxSchedule):
  """The same factor at every step: 1 keeps the weights, 0 makes them 0."""

  def factor_at(self, step: Leaf) -> Leaf:
    """Returns the factor of the weights, a Python number, for any step."""
    return self.factor


@dataclasses.dataclass(frozen=True)
class Linear(AuxSchedule):
  """A first factor, then a straight line to a final factor, which stays."""

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
    'Number of optimizer steps over which the factor changes in a straight '
    'line.',
    minimum=1,
  )

  def factor_at(self, step: Leaf) -> Leaf:
    """Returns the weights' factor, which moves on a line after `start_step`."""
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
