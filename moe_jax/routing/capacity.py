"""Capacity: how many slots an expert has in each group; checks of K and C.

The papers and codebases mean two things by a capacity factor, so each meaning
is a rule of its own: `PerToken` and `PerAssignment`.
"""

import dataclasses
import fractions
import math

from moe_jax.config import Kinds, Options, option
from moe_jax.errors import InputError
from moe_jax.shapes import is_whole


def check_selected(num_selected: int, num_experts: int) -> None:
  """Raises ValueError where K is not in [1, E]."""
  if not 1 <= num_selected <= num_experts:
    raise InputError(
      f'num_selected={num_selected} not in [1, num_experts={num_experts}]'
    )


def check_capacity(capacity: int | None) -> None:
  """Raises ValueError where C is neither None nor an integer of at least 1."""
  if capacity is None or (is_whole(capacity) and capacity >= 1):
    return
  raise InputError(f'capacity={capacity!r} must be at least 1, or None')


def check_slots(capacity: int, group_size: int) -> None:
  """Raises ValueError where C is no integer in [1, S]."""
  if not (is_whole(capacity) and 1 <= capacity <= group_size):
    raise InputError(f'capacity={capacity} not in [1, group_size={group_size}]')


_ROUNDINGS = {'ceil': math.ceil, 'floor': math.floor, 'round': round}


class Capacity(Options):
  """The contract of a rule for how many slots an expert has in each group."""

  @property
  def binds(self) -> bool:
    """Whether an expert can be full, so that choices are dropped."""
    return True

  def per_expert(
    self, group_size: int, num_experts: int, num_selected: int
  ) -> int:
    """The slots of an expert in each group, C in [1, S], a Python int.

    No rule gives more than S: a token takes at most one slot of an expert.

    Args:
      group_size: S, the number of tokens of a group.
      num_experts: E, the number of experts.
      num_selected: K, the number of experts that a token chooses.
    """
    raise NotImplementedError

  def keeps_in_generation(self, single: bool) -> bool:
    """Whether generation keeps this rule instead of giving room to all tokens.

    A rule that fixes how many tokens an expert takes is part of what an
    imported checkpoint computes; other rules only bound the buffers of
    training.

    Args:
      single: Whether each step of generation has one token a group.
    """
    del single
    return False


@dataclasses.dataclass(frozen=True)
class _Share(Capacity):
  """A capacity: `factor` times an expert's equal share of tokens or choices."""

  factor: float = option(
    1.25,
    'Capacity factor: slots of all experts together, divided by the tokens of '
    "the group ('per_token', so that 1.25 with two choices is 0.625 slots a "
    "choice) or by their choices ('per_assignment').",
    above=0,
  )
  rounding: str = option(
    'ceil',
    "Rounding of the capacity to whole slots: 'ceil' (V-MoE), 'floor' (Mesh "
    "TensorFlow) or 'round' (flaxformer; half to even).",
    choices=_ROUNDINGS,
  )
  multiple: int = option(
    1,
    'The capacity is rounded up to a multiple of this number of slots (4 in '
    'V-MoE); 1 leaves it as it is.',
    minimum=1,
  )
  minimum: int = option(
    1,
    'Least capacity, in slots per expert and group (4 in flaxformer).',
    minimum=1,
  )

  def _share(self, quotient: fractions.Fraction, group_size: int) -> int:
    # Fractions are exact. In floating point 1.1 * 100 / 10 is over 11, which
    # 'ceil' would round to a slot too many.
    quotient *= fractions.Fraction(str(self.factor))
    slots = max(_ROUNDINGS[self.rounding](quotient), self.minimum)
    slots = -(-slots // self.multiple) * self.multiple
    return min(slots, group_size)


@dataclasses.dataclass(frozen=True)
class PerToken(_Share):
  """A capacity of factor * S / E (Switch, ST-MoE; GShard with factor 2)."""

  def per_expert(self, group_size, num_experts, num_selected):
    return self._share(fractions.Fraction(group_size, num_experts), group_size)


@dataclasses.dataclass(frozen=True)
class PerAssignment(_Share):
  """A capacity of factor * K * S / E (V-MoE, MegaBlocks)."""

  def per_expert(self, group_size, num_experts, num_selected):
    quotient = fractions.Fraction(num_selected * group_size, num_experts)
    return self._share(quotient, group_size)


@dataclasses.dataclass(frozen=True)
class Fraction(Capacity):
  """A capacity of factor * S for any number of experts (NLLB's evaluation).

  The floating-point product is rounded up, as fairseq and transformers do.
  """

  factor: float = option(
    1.0,
    'Slots of each expert as a fraction of the number of tokens in a group.',
    above=0,
  )

  def per_expert(self, group_size, num_experts, num_selected):
    return min(math.ceil(self.factor * group_size), group_size)

  def keeps_in_generation(self, single):
    """True: imported checkpoints have this capacity in generation, too.

    `single`, whether a step has one token a group, makes no difference.
    """
    return True


@dataclasses.dataclass(frozen=True)
class Fixed(Capacity):
  """A capacity of the same number of slots for groups of every size."""

  slots: int = option(
    1,
    'Slots of each expert in each group; never more than the group has tokens.',
    minimum=1,
  )

  def per_expert(self, group_size, num_experts, num_selected):
    return min(self.slots, group_size)

  def keeps_in_generation(self, single):
    """True, unless each step of generation has one token a group.

    A token that is alone in its group has a slot in every expert anyway.
    """
    return not single


@dataclasses.dataclass(frozen=True)
class All(Capacity):
  """A capacity of one slot for each token of the group: nothing is dropped."""

  @property
  def binds(self):
    return False

  def per_expert(self, group_size, num_experts, num_selected):
    return group_size


CAPACITIES = Kinds(
  'capacity',
  Capacity,
  {
    'per_token': PerToken,
    'per_assignment': PerAssignment,
    'fraction': Fraction,
    'fixed': Fixed,
    'all': All,
  },
)
