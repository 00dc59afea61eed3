"""Rules for the values of options, and messages where a value breaks one."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union

from moe_jax.errors import InputError

_LARGEST = 3.4028235e38
# First word of the reason that an option has no effect, where the reason is the
# value of another option.
UNLESS = 'unless'
_FEW = 8  # names that are listed even where one of them is near


def unknown(noun: str, value: Any, names: Iterable[Any]) -> ValueError:
  """The error for a name that does not exist; it lists all, nearest first."""
  return InputError(unknown_text(noun, value, names))


def unknown_text(noun: str, value: Any, names: Iterable[Any]) -> str:
  """The message of `unknown`."""
  names = sorted(str(name) for name in names)
  near = difflib.get_close_matches(str(value), names, n=1)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  return f'unknown {noun} {value!r}; {hint}have {names}'


def unknown_key_text(name: str, names: Iterable[str]) -> str:
  """The message for a key that no config has.

  Args:
    name: The dotted name of the key.
    names: The dotted names beside it; a long list is left out where one of them
      is near.
  """
  names = sorted(names)
  near = difflib.get_close_matches(name, names, n=1)
  if not near or len(names) <= _FEW:
    return unknown_text('config key', name, names)
  return (
    f'unknown config key {name!r}; did you mean {near[0]!r}? --describe prints '
    'all keys'
  )


class OptionError(InputError):
  """All problems of some options, in one error.

  Attributes:
    problems: A text for each problem, once, which begins with the option's
      dotted name.
  """

  def __init__(self, problems: Iterable[str]):
    # Both halves of a model may say the same.
    self.problems = tuple(dict.fromkeys(problems))
    super().__init__('\n'.join(self.problems))

  def below(self, path: str) -> 'OptionError':
    """The same error with `path` put before the name of every option."""
    return OptionError(f'{path}{text}' for text in self.problems)


@dataclasses.dataclass(frozen=True)
class Check:
  """A rule for the values of an option.

  Attributes:
    rule: The rule in words that follow a value: 'must be at least 1'.
    holds: Returns whether a value keeps the rule.
    names: The names that are allowed, where the rule is a list of names.
  """

  rule: str
  holds: Callable[[Any], bool]
  names: tuple[str, ...] = ()

  def problem(self, name: str, value: Any) -> str | None:
    """The message for a value that breaks the rule; None if it keeps it."""
    if self.holds(value):
      return None
    if self.names:
      return f'{name}={value!r}: {unknown_text(name, value, self.names)}'
    return f'{name}={value!r} {self.rule}'


def at_least(low: int | float) -> Check:
  """The rule value >= low."""
  return Check(f'must be at least {low}', lambda value: value >= low)


def above(low: int | float) -> Check:
  """The rule value > low."""
  return Check(f'must be above {low}', lambda value: value > low)


def within(interval: str) -> Check:
  """The rule that a value is in an interval, such as '[0, 1)' or '(0, 1]'."""
  low, high = (float(part) for part in interval[1:-1].split(','))

  def holds(value):
    above_low = value > low if interval[0] == '(' else value >= low
    return above_low and (
      value < high if interval[-1] == ')' else value <= high
    )

  return Check(f'not in {interval}', holds)


def one_of(*names: str) -> Check:
  """The rule that a value is one of these names."""
  return Check(f'not in {list(names)}', lambda value: value in names, names)


def each(check: Check) -> Check:
  """The rule that every item of a tuple keeps `check`."""
  return Check(
    f': each {check.rule}', lambda values: all(map(check.holds, values))
  )


def anything(reason: str) -> Check:
  """A rule that every value keeps; `reason` says why all are allowed."""
  return Check(reason, lambda value: True)


# The rule for seeds, which are stored as unsigned numbers of 32 bits.
SEED = within('[0, 4294967296)')

# The rule that a text, or anything with a length, is not empty.
NOT_EMPTY = Check('must be given', bool)

# The condition under which an option has an effect: the values, or a rule, of
# other options of its dataclass, such as {'policy': ('threshold',)} or
# {'num_experts': at_least(1)}.
When = Mapping[str, tuple[Any, ...] | Check]


def of_type(value: Any, hint: Any) -> bool:
  """Whether a value has a field's type; integers, but no bools, are floats."""
  origin = typing.get_origin(hint)
  if origin in (types.UnionType, Union):
    return any(of_type(value, part) for part in typing.get_args(hint))
  if origin is tuple:
    return isinstance(value, tuple) and _items_fit(value, typing.get_args(hint))
  if origin is not None:
    return isinstance(value, origin)
  if hint is Any:
    return True
  if hint in (int, float) and isinstance(value, bool):
    return False
  if hint is float:
    return isinstance(value, int | float)
  return isinstance(value, hint)


def _items_fit(value, hints) -> bool:
  if len(hints) == 2 and hints[1] is Ellipsis:
    return all(of_type(item, hints[0]) for item in value)
  return len(value) == len(hints) and all(map(of_type, value, hints))


def number_problem(
  value: Any,
  *,
  whole: bool = True,
  unsigned: bool = False,
  infinite: bool = False,
) -> str | None:
  """The rule that a number breaks because arrays could not hold it, or None.

  Args:
    value: A number, or a tuple with numbers in it, nested or not.
    whole: Whether an integer is stored as one, not as a float.
    unsigned: Whether it is stored without a sign, so that it may be larger.
    infinite: Whether infinity is a value.
  """
  if isinstance(value, tuple):
    problems = (number_problem(item, infinite=infinite) for item in value)
    return next(filter(None, problems), None)
  if isinstance(value, int) and whole:
    if -(2**31) <= value < 2 ** (32 if unsigned else 31):
      return None
    return "does not fit into JAX's integers of 32 bits"
  if not isinstance(value, int | float) or (infinite and value == math.inf):
    return None
  if value != value or abs(value) == math.inf:
    return 'must be finite'
  if abs(value) > _LARGEST:
    return f'is infinite in float32, whose largest number is {_LARGEST}'
  return None


def type_name(hint: Any) -> str:
  """The name of a type, for messages."""
  return hint.__name__ if isinstance(hint, type) else str(hint)


def in_force(value_of: Callable[[str], Any], when: When) -> bool:
  """Whether a condition holds.

  Args:
    value_of: Returns the value of the option of a name.
    when: The condition; see `When`.
  """
  for name, allowed in when.items():
    value = value_of(name)
    if isinstance(allowed, Check):
      if not allowed.holds(value):
        return False
    elif value not in allowed:
      return False
  return True


def no_effect(name: str, value: Any, why: str) -> str:
  """The message for an option that is set where it cannot matter."""
  return f'{name}={value!r} has no effect {why}'


def needs(when: When, prefix: str = '') -> str:
  """The reason, after 'has no effect', where the condition does not hold."""
  conditions = (
    f'{prefix}{name} {allowed.rule.replace("must be", "is")}'
    if isinstance(allowed, Check)
    else f'{prefix}{name} in {list(allowed)}'
    for name, allowed in when.items()
  )
  return f'{UNLESS} {" and ".join(conditions)}'
