"""Typed options: dataclasses whose fields carry a default, a sentence, rules.

    @dataclasses.dataclass(frozen=True)
    class FfnConfig(Options):
      hidden: int = option(512, 'Width of the hidden layer.', at_least(1))

An option is declared in its field alone; `moe_jax.sections` makes sections of a
config from these classes and reads them back.
"""

import dataclasses
import functools
import numbers
import operator
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeVar, cast

from moe_jax import plugins
from moe_jax.option_checks import (  # noqa: F401 - for users of options
  NOT_EMPTY,
  SEED,
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
  number_problem,
  of_type,
  one_of,
  type_name,
  unknown,
  within,
)

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
    infinite: Whether infinity is a value.
    how: Whether it only says how something is computed, started or trained, so
      that outside of training it does not change what the parameters compute.
  """

  sentence: str = ''
  checks: tuple[Check, ...] = ()
  when: When = dataclasses.field(default_factory=dict)
  kinds: 'Kinds | None' = None
  holds_entries: bool = False
  infinite: bool = False
  how: bool = False


_NO_SPEC = Spec()


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
    default: The default value; without it, a value is required.
    sentence: A sentence on it, with its unit and the meaning of zero.
    *checks: Rules for its values.
    when: Values of neighbours under which it has an effect; otherwise only the
      default is allowed.
    infinite: Whether infinity is allowed; NaN never is.
    how: Whether outside of training it changes results by rounding at most;
      see `Spec`.
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
    value,
    whole=hint is not float,
    unsigned=SEED in spec.checks,
    infinite=spec.infinite,
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
