"""Typed options: dataclasses whose fields carry a default, a sentence, rules.

    @dataclasses.dataclass(frozen=True)
    class FfnConfig(Options):
      hidden: int = option(512, 'Width of the hidden layer.', at_least(1))

Rules for values, and messages where a value breaks one, stand first. An option
is declared in its field alone; `moe_jax.sections` makes sections of a
config from these classes and reads them back.
"""

import dataclasses
import difflib
import functools
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar, Union, cast

from moe_jax import plugins
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
  value: Any, *, whole: bool = True, unsigned: bool = False
) -> str | None:
  """The rule that a number breaks because arrays could not hold it, or None.

  Args:
    value: A number, or a tuple with numbers in it, nested or not.
    whole: Whether an integer is stored as one, not as a float.
    unsigned: Whether it is stored without a sign, so that it may be larger.
  """
  if isinstance(value, tuple):
    problems = map(number_problem, value)
    return next(filter(None, problems), None)
  if isinstance(value, int) and whole:
    if -(2**31) <= value < 2 ** (32 if unsigned else 31):
      return None
    return "does not fit into JAX's integers of 32 bits"
  if not isinstance(value, int | float):
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


_KEY = 'moe_jax'
F = TypeVar('F', bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Spec:
  """Description of an option, kept in the metadata of its dataclass field.

  Attributes:
    sentence: A sentence on the option, understood without its neighbours.
    checks: Rules for its values.
    when: Values of its neighbours under which it has an effect; with {} it
      always has.
    kinds: The kinds to choose from; None for an option that is no choice.
    holds_entries: Whether it holds several choices, each by a user's name.
    how: Whether it only says how something is computed, started or trained, so
      that outside of training it does not change what the parameters compute.
  """

  sentence: str = ''
  checks: tuple[Check, ...] = ()
  when: When = dataclasses.field(default_factory=dict)
  kinds: 'Kinds | None' = None
  holds_entries: bool = False
  how: bool = False


_NO_SPEC = Spec()


def option(
  default: Any = dataclasses.MISSING,
  sentence: str = '',
  *checks: Check,
  when: When | None = None,
  how: bool = False,
) -> Any:
  """A field of an `Options` dataclass.

  Args:
    default: The default value; without it, a value is required.
    sentence: A sentence on it, with its unit and the meaning of zero.
    *checks: Rules for its values.
    when: Values of neighbours under which it has an effect; otherwise only the
      default is allowed.
    how: Whether outside of training it changes results by rounding at most;
      see `Spec`.
  """
  spec = Spec(sentence, checks, when or {}, how=how)
  return _field(default, spec)


def choice(
  kinds: 'Kinds',
  default: 'str | Options',
  sentence: str,
  *,
  when: When | None = None,
  how: bool = False,
) -> Any:
  """A field that holds the options of the chosen kind.

  Args:
    kinds: The kinds to choose from.
    default: The name of the default kind, or its options.
    sentence: A sentence on what is chosen.
    when: The same as in `option`.
    how: The same as in `option`.
  """
  if isinstance(default, str):
    default = kinds.builtin[default]()
  return _field(default, Spec(sentence, (), when or {}, kinds, how=how))


def entries(
  kinds: 'Kinds', default: Mapping[str, 'Options'], sentence: str
) -> Any:
  """A field that holds any number of choices, each by a name of the user's.

  Its section is open: a config adds entries, each with its `kind` and the
  options of that kind beside it.
  """
  return _field(default, Spec(sentence, kinds=kinds, holds_entries=True))


def nested(
  default: 'Options',
  sentence: str,
  *,
  when: When | None = None,
  how: bool = False,
) -> Any:
  """A field that holds other options: a section within a section."""
  return _field(default, Spec(sentence, when=when or {}, how=how))


def _field(default, spec):
  # A default that cannot be hashed needs a factory.
  if isinstance(default, Mapping):
    return dataclasses.field(
      default_factory=lambda: dict(default), metadata={_KEY: spec}
    )
  return dataclasses.field(default=default, metadata={_KEY: spec})


def spec_of(field: dataclasses.Field) -> Spec:
  """The description of the option that a field holds."""
  return field.metadata.get(_KEY, _NO_SPEC)


def default_of(field: dataclasses.Field) -> Any:
  """A field's default; `dataclasses.MISSING` where a value is required."""
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


@functools.cache
def fields_of(cls: type) -> Mapping[str, dataclasses.Field]:
  """The fields of a dataclass that are options, by name."""
  return {field.name: field for field in dataclasses.fields(cls) if field.init}


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
  """The type of each field of a dataclass, forward references resolved."""
  return typing.get_type_hints(cls)


class Kinds:
  """The kinds that a choice can have: classes of options, each with a name.

  A config names a built-in class, or a user's own as 'module:name'.

  Attributes:
    noun: The noun for a kind in messages: 'router'.
    base: The class that every kind extends: the contract.
    builtin: The built-in classes, by name.
    inline: Whether the options of all kinds stand beside `kind` in one section,
      where kinds share options of the same name; otherwise each kind has a
      section of its own name.
  """

  def __init__(
    self,
    noun: str,
    base: type,
    builtin: Mapping[str, type],
    *,
    inline: bool = False,
  ):
    self.noun = noun
    self.base = base
    self.builtin = dict(builtin)
    self.inline = inline

  def get(self, name: str) -> type:
    """The class of options of that name.

    Raises:
      ValueError: No kind has this name, or a user's class breaks the contract.
    """
    if isinstance(name, str):
      if name in self.builtin:
        return self.builtin[name]
      if ':' in name:
        return plugins.load(name, self.noun, self.base)
    raise unknown(self.noun, name, [*self.builtin, 'module:name'])

  def name_of(self, chosen: Any) -> str:
    """The name that a config has for the class of the chosen options."""
    for name, cls in self.builtin.items():
      if type(chosen) is cls:
        return name
    return f'{type(chosen).__module__}:{type(chosen).__qualname__}'


def required(method: F) -> F:
  """Marks a method of a contract that every subclass has to define."""
  method.is_required = True
  return method


class Options:
  """Base of dataclasses of options; an instance checks its fields at once.

  A subclass adds rules that concern several fields in `problems`.
  """

  def __post_init__(self):
    """Raises OptionError with all problems of the values."""
    # Rules for several fields assume that each is valid by itself.
    if texts := list(self._field_problems()) or list(self.problems()):
      raise OptionError(texts)

  def problems(self) -> Iterator[str]:
    """The problems of several fields together, a text for each."""
    return iter(())

  @classmethod
  def spelled_out(cls, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section with its short notations as the options that they stand for.

    Raises:
      OptionError: A notation is wrong.
    """
    return section

  def shrunk(self) -> Self:
    """The same options at a laptop's size, for a config with ':runlocal'.

    A class with sizes overrides this; by default nested options are shrunk.
    """
    changes = {}
    for name in fields_of(type(self)):
      value = getattr(self, name)
      if isinstance(value, Options):
        changes[name] = value.shrunk()
      elif isinstance(value, Mapping):
        changes[name] = {
          key: entry.shrunk() if isinstance(entry, Options) else entry
          for key, entry in value.items()
        }
    return dataclasses.replace(cast(Any, self), **changes)

  def _field_problems(self) -> Iterator[str]:
    hints = types_of(type(self))
    for name, field in fields_of(type(self)).items():
      spec, value = spec_of(field), getattr(self, name)
      if isinstance(value, numbers.Integral) and not isinstance(value, int):
        value = operator.index(value)  # an integer of numpy
        object.__setattr__(self, name, value)
      problem = value_problem(name, value, hints[name], spec)
      if problem is None and has_no_effect(self, name):
        problem = no_effect(name, value, needs(spec.when))
      if problem is not None:
        yield problem
      elif isinstance(value, int) and hints[name] is float:
        object.__setattr__(self, name, float(value))


def value_problem(name: str, value: Any, hint: Any, spec: Spec) -> str | None:
  """The problem of one value by itself; None for a valid one."""
  if spec.holds_entries and spec.kinds is not None:
    bad = [n for n, v in value.items() if not isinstance(v, spec.kinds.base)]
    return f'{name}.{bad[0]} is no {spec.kinds.noun}' if bad else None
  assignment = f'{name}={value!r}'
  if spec.kinds is not None:
    if isinstance(value, spec.kinds.base):
      return None
    class_names = sorted(cls.__name__ for cls in spec.kinds.builtin.values())
    return f'{assignment} is no {spec.kinds.base.__name__}; have {class_names}'
  if not of_type(value, hint):
    return f'{assignment} is a {type(value).__name__}, not {type_name(hint)}'
  if rule := number_problem(
    value, whole=hint is not float, unsigned=SEED in spec.checks
  ):
    return f'{assignment} {rule}'
  problems = (check.problem(name, value) for check in spec.checks)
  return next(filter(None, problems), None)


def has_no_effect(options: Options, name: str) -> bool:
  """Whether a field has another value than its default, but no effect."""
  field = fields_of(type(options))[name]
  if getattr(options, name) == default_of(field):
    return False
  return not in_force(functools.partial(getattr, options), spec_of(field).when)
