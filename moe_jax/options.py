"""Typed options: dataclasses whose fields carry a default, a sentence, a rule.

    @dataclasses.dataclass(frozen=True)
    class FfnConfig(Options):
      hidden: int = option(512, 'Width of the hidden layer.', at_least(1))

A field is the only place where an option is written down. Sections of a config
are made from these classes and read into them by `moe_jax.sections`.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from moe_jax import plugins
from moe_jax.option_checks import (
  NOT_EMPTY,
  Check,
  OptionError,
  When,
  above,
  anything,
  at_least,
  each,
  in_force,
  needs,
  no_effect,
  of_type,
  one_of,
  type_name,
  unknown,
  unknown_text,
  within,
)

__all__ = [
  'NOT_EMPTY',
  'Check',
  'Kinds',
  'OptionError',
  'Options',
  'Spec',
  'When',
  'above',
  'anything',
  'at_least',
  'choice',
  'default_of',
  'each',
  'entries',
  'fields_of',
  'has_no_effect',
  'in_force',
  'needs',
  'nested',
  'no_effect',
  'of_type',
  'one_of',
  'option',
  'required',
  'spec_of',
  'type_name',
  'types_of',
  'unknown',
  'unknown_text',
  'value_problem',
  'within',
]

_KEY = 'moe_jax'
O = TypeVar('O', bound='Options')
F = TypeVar('F', bound=Callable[..., Any])


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


@functools.cache
def fields_of(cls: type) -> Mapping[str, dataclasses.Field]:
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
    return (
      f'{name}={value!r} is a {type(value).__name__}, not {type_name(hint)}'
    )
  if isinstance(value, float) and not (
    math.isfinite(value) or (spec.infinite and not math.isnan(value))
  ):
    return f'{name}={value!r} must be finite'
  for check in spec.checks:
    problem = check.problem(name, value)
    if problem is not None:
      return problem
  return None


def has_no_effect(options: Options, name: str) -> bool:
  """Whether a field is set, to another value than its default, in vain."""
  field = fields_of(type(options))[name]
  if getattr(options, name) == default_of(field):
    return False
  return not in_force(functools.partial(getattr, options), spec_of(field).when)
