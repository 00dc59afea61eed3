"""Typed options: dataclasses whose fields carry a default, a sentence, a rule.

    @dataclasses.dataclass(frozen=True)
    class FfnConfig(Options):
      hidden: int = option(512, 'Width of the hidden layer.', at_least(1))

A field is the only place where an option is written down. Sections of a config
are made from these classes and read into them by `moe_jax.sections`.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, Union

_KEY = 'moe_jax'
# How the reason begins that an option has no effect beside its neighbours.
UNLESS = 'unless'
O = TypeVar('O', bound='Options')
F = TypeVar('F', bound=Callable[..., Any])


def unknown(what: str, value: Any, have: Iterable[Any]) -> ValueError:
  """The error for a name that does not exist; it gives the nearest and all."""
  return ValueError(unknown_text(what, value, have))


def unknown_text(what: str, value: Any, have: Iterable[Any]) -> str:
  """The message of `unknown`."""
  have = sorted(str(name) for name in have)
  near = difflib.get_close_matches(str(value), have, n=1)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  return f'unknown {what} {value!r}; {hint}have {have}'


class OptionError(ValueError):
  """What is wrong with options, all at once.

  Attributes:
    problems: One text for each; each begins with the option's dotted name.
  """

  def __init__(self, problems: Iterable[str]):
    self.problems = tuple(problems)
    super().__init__('\n'.join(self.problems))

  def below(self, path: str) -> 'OptionError':
    """The same problems of options that stand below `path` in a config."""
    return OptionError(f'{path}{text}' for text in self.problems)


@dataclasses.dataclass(frozen=True)
class Check:
  """A rule that the values of an option keep.

  Attributes:
    rule: The rule in words that follow a value: 'must be at least 1'.
    holds: Whether a value keeps it.
    names: The names that are allowed, where the rule is a list of names.
  """

  rule: str
  holds: Callable[[Any], bool]
  names: tuple[str, ...] = ()

  def problem(self, name: str, value: Any) -> str | None:
    """What is wrong with a value of the right type; None if nothing is."""
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
  """The rule of an interval as it is written: '[0, 1)' or '(0, 1]'."""
  low, high = (float(part) for part in interval[1:-1].split(','))

  def holds(value):
    above_low = value > low if interval[0] == '(' else value >= low
    return above_low and (
      value < high if interval[-1] == ')' else value <= high
    )

  return Check(f'not in {interval}', holds)


def one_of(*names: str) -> Check:
  """The rule of a list of names."""
  return Check(f'not in {list(names)}', lambda value: value in names, names)


def each(check: Check) -> Check:
  """The rule that every item of a tuple keeps `check`."""
  return Check(
    f': each {check.rule}', lambda values: all(map(check.holds, values))
  )


def anything(reason: str) -> Check:
  """No rule: every value of the type will do, for the reason that is given."""
  return Check(reason, lambda value: True)


# The rule that a text, or anything with a length, is not empty.
NOT_EMPTY = Check('must be given', bool)

# Values of other options of the same dataclass under which an option has an
# effect: {'policy': ('threshold',)}, or {'num_experts': at_least(1)}.
When = Mapping[str, tuple[Any, ...] | Check]


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a field says of its option beside type and default.

  Attributes:
    sentence: What the option is, in a sentence.
    checks: Rules that its values keep.
    when: Under which values of its neighbours it has an effect; {}: always.
    kinds: What it chooses among; None of an option that is no choice.
    many: Whether it holds several choices, each by a name of the user's.
    infinite: Whether infinity is a value.
    how: Whether it says only how something is computed, started or trained:
      what the parameters compute outside of training does not depend on it.
  """

  sentence: str = ''
  checks: tuple[Check, ...] = ()
  when: When = dataclasses.field(default_factory=dict)
  kinds: 'Kinds | None' = None
  many: bool = False
  infinite: bool = False
  how: bool = False


def option(
  default: Any = dataclasses.MISSING,
  sentence: str = '',
  *checks: Check,
  when: When | None = None,
  infinite: bool = False,
  how: bool = False,
) -> Any:
  """A field of an `Options` dataclass.

  Args:
    default: Its value where none is given; required if missing.
    sentence: What it is, with its unit and the meaning of zero.
    *checks: Rules that its values keep.
    when: Values of neighbours under which it has an effect. A value other than
      the default is refused elsewhere.
    infinite: Whether infinity is allowed; NaN never is.
    how: Whether outside of training it changes nothing that is computed, but
      for rounding; see `Spec`.
  """
  spec = Spec(sentence, checks, when or {}, infinite=infinite, how=how)
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
    kinds: What there is to choose from.
    default: What is chosen by default: a kind's name, or its options.
    sentence: What is chosen.
    when: As in `option`.
    how: As in `option`.
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
  return _field(default, Spec(sentence, kinds=kinds, many=True))


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
  # Frozen dataclasses are hashable; mappings, of open sections, are not.
  if isinstance(default, Mapping):
    return dataclasses.field(
      default_factory=lambda: dict(default), metadata={_KEY: spec}
    )
  return dataclasses.field(default=default, metadata={_KEY: spec})


def spec_of(field: dataclasses.Field) -> Spec:
  """What a field says of its option."""
  return field.metadata.get(_KEY, Spec())


def default_of(field: dataclasses.Field) -> Any:
  """A field's default; `dataclasses.MISSING` where it is required."""
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
  """The fields that are options, by name."""
  return {field.name: field for field in dataclasses.fields(cls) if field.init}


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
  """The resolved type of each field."""
  return typing.get_type_hints(cls)


class Kinds:
  """What a choice has to choose from: options classes, each with a name.

  A config names one of ours, or a user's own as 'module:name'.

  Attributes:
    what: What is chosen, for messages: 'router'.
    base: The class that all of them extend: the contract.
    builtin: Ours, by name.
    inline: Whether their options stand beside `kind` in the section, those of
      one name shared, or each kind's in a section of its own name.
  """

  def __init__(
    self,
    what: str,
    base: type,
    builtin: Mapping[str, type],
    *,
    inline: bool = False,
  ):
    self.what = what
    self.base = base
    self.builtin = dict(builtin)
    self.inline = inline

  def get(self, name: str) -> type:
    """The options class of that name.

    Raises:
      ValueError: There is none, or a user's is none of this contract.
    """
    if name in self.builtin:
      return self.builtin[name]
    if isinstance(name, str) and ':' in name:
      from moe_jax import plugins  # a user's module may import this one

      return plugins.load(name, self.what, self.base)
    raise unknown(self.what, name, [*self.builtin, 'module:name'])

  def name_of(self, chosen: Any) -> str:
    """The name of an instance's class, as a config writes it."""
    for name, cls in self.builtin.items():
      if type(chosen) is cls:
        return name
    return f'{type(chosen).__module__}:{type(chosen).__qualname__}'


def required(method: F) -> F:
  """Marks a method of a contract that every class of it defines itself."""
  method.is_required = True
  return method


class Options:
  """Base of dataclasses of options: checks its fields when it is made.

  A subclass adds rules that concern several fields in `problems`.
  """

  def __post_init__(self):
    """Raises OptionError with all that is wrong."""
    found = list(self._field_problems())
    # What several fields mean together is only defined for valid ones.
    found = found or list(self.problems())
    if found:
      raise OptionError(found)

  def problems(self) -> Iterator[str]:
    """What is wrong with several fields together, each text a problem."""
    return iter(())

  def shrunk(self: O) -> O:
    """The same options at a laptop's size, as ':runlocal' tries a config out.

    A class that has sizes overrides this; the base shrinks what it holds.
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
    return dataclasses.replace(self, **changes)

  def _field_problems(self) -> Iterator[str]:
    hints = types_of(type(self))
    for name, field in fields_of(type(self)).items():
      spec, value = spec_of(field), getattr(self, name)
      problem = value_problem(name, value, hints[name], spec)
      if problem is None and has_no_effect(self, name):
        problem = no_effect(name, value, needs(spec.when))
      if problem is not None:
        yield problem
      elif isinstance(value, int) and hints[name] is float:
        object.__setattr__(self, name, float(value))


def value_problem(name: str, value: Any, hint: Any, spec: Spec) -> str | None:
  """What is wrong with one value by itself; None if nothing is."""
  if spec.many:
    wrong = [n for n, v in value.items() if not isinstance(v, spec.kinds.base)]
    return f'{name}.{wrong[0]} is no {spec.kinds.what}' if wrong else None
  if spec.kinds is not None:
    if isinstance(value, spec.kinds.base):
      return None
    return (
      f'{name}={value!r} is no {spec.kinds.base.__name__}; have '
      f'{sorted(c.__name__ for c in spec.kinds.builtin.values())}'
    )
  if not of_type(value, hint):
    return f'{name}={value!r} is a {type(value).__name__}, not {_said(hint)}'
  if isinstance(value, float) and not (
    math.isfinite(value) or (spec.infinite and not math.isnan(value))
  ):
    return f'{name}={value!r} must be finite'
  for check in spec.checks:
    problem = check.problem(name, value)
    if problem is not None:
      return problem
  return None


def of_type(value: Any, hint: Any) -> bool:
  """Whether a value is of a field's type; an integer is a float, no bool is."""
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


def _items_fit(value, parts) -> bool:
  if len(parts) == 2 and parts[1] is Ellipsis:
    return all(of_type(item, parts[0]) for item in value)
  return len(value) == len(parts) and all(map(of_type, value, parts))


def _said(hint: Any) -> str:
  return hint.__name__ if isinstance(hint, type) else str(hint)


def in_force(values: Callable[[str], Any], when: When) -> bool:
  """Whether an option has an effect, given its neighbours' values."""
  for name, allowed in when.items():
    value = values(name)
    if isinstance(allowed, Check):
      if not allowed.holds(value):
        return False
    elif value not in allowed:
      return False
  return True


def has_no_effect(options: Options, name: str) -> bool:
  """Whether a field is set, to another value than its default, in vain."""
  field = fields_of(type(options))[name]
  if getattr(options, name) == default_of(field):
    return False
  return not in_force(functools.partial(getattr, options), spec_of(field).when)


def no_effect(name: str, value: Any, why: str) -> str:
  """The message for an option that is set where it cannot matter."""
  return f'{name}={value!r} has no effect {why}'


def needs(when: When, prefix: str = '') -> str:
  """Why an option has no effect, in words that follow 'has no effect'."""
  parts = (
    f'{prefix}{other} {allowed.rule.replace("must be", "is")}'
    if isinstance(allowed, Check)
    else f'{prefix}{other} in {list(allowed)}'
    for other, allowed in when.items()
  )
  return f'{UNLESS} {" and ".join(parts)}'
