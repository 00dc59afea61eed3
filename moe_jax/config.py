"""Typed options, and the sections of a config that mirror them."""

import copy
import dataclasses
import difflib
import functools
import importlib
import math
import numbers
import operator
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self, TypeVar, Union, cast

import ml_collections
from ml_collections import config_dict

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
        return load_class(name, self.noun, self.base)
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


def load_class(name: str, noun: str, base: type) -> type:
  """The class that 'module:name' names.

  Args:
    name: An importable module and a class in it, 'package.module:Class'.
    noun: The noun for the class in messages: 'router'.
    base: The class that it has to extend.

  Raises:
    ValueError: The module cannot be imported, has no such class, or the class
      does not keep the contract: it does not extend `base`, is no dataclass, or
      lacks a method that every class of the contract defines.
  """
  module_name, _, attribute = name.partition(':')
  try:
    module = importlib.import_module(module_name)
  except Exception as error:
    lines = [
      f'{frame.filename}, line {frame.lineno}: {frame.line}: '
      for frame in traceback.extract_tb(error.__traceback__)[1:]
      if 'importlib' not in frame.filename
    ]
    kind = '' if isinstance(error, ImportError) else f'{type(error).__name__}: '
    raise InputError(
      f'{noun} {name!r} cannot be imported: {"".join(lines[:1])}{kind}{error}'
    ) from error
  cls = getattr(module, attribute, None)
  if cls is None:
    raise InputError(f'{noun} {name!r}: {module_name} has no {attribute!r}')
  if not (isinstance(cls, type) and issubclass(cls, base)):
    raise InputError(
      f'{noun} {name!r} does not extend {base.__module__}.{base.__name__}'
    )
  _check_contract(f'{noun} {name!r}', cls, base)
  return cls


def _check_contract(label: str, cls: type, base: type) -> None:
  """Raises ValueError for a class that does not keep the contract `base`."""
  if '__dataclass_fields__' not in vars(cls):
    raise InputError(
      f'{label} is no dataclass, so that its options are unknown; put '
      '@dataclasses.dataclass(frozen=True) above it'
    )
  missing = [
    name
    for name in dir(base)
    if getattr(getattr(base, name), 'is_required', False)
    and getattr(cls, name) is getattr(base, name)
  ]
  if missing:
    raise InputError(
      f'{label} does not define {", ".join(missing)}, which '
      f'{base.__module__}.{base.__name__} asks of it'
    )


ConfigDict = ml_collections.ConfigDict
T = TypeVar('T', bound=Options)
# A ConfigDict does not count as a Mapping.
Section = Mapping[str, Any] | ConfigDict

KIND, CUSTOM = 'kind', 'custom'


class Leaf(NamedTuple):
  """One key of a config.

  Attributes:
    path: The dotted name of the key.
    value: The value of the key.
    default: The default; `dataclasses.MISSING` where a value is required.
    spec: The description of the option; of a choice, for the key 'kind'.
    idle: The reason why the key 'has no effect', in words after these, or None.
  """

  path: str
  value: Any
  default: Any
  spec: Spec
  idle: str | None

  @property
  def changed(self) -> bool:
    """Whether the value differs from the default."""
    if self.default is dataclasses.MISSING:
      return self.value not in (None, dataclasses.MISSING)
    return plain(self.value) != plain(self.default)

  @property
  def unmet(self) -> bool:
    """Whether it has no effect because of a neighbour's value, not a kind."""
    return self.idle is not None and self.idle.startswith(UNLESS)


def as_mapping(config: Section) -> Mapping[str, Any]:
  """A section as plain nested mappings, which are faster to read."""
  return config.to_dict() if isinstance(config, ConfigDict) else config


class Reader:
  """Reads a section; `check` raises all problems."""

  def __init__(self, *, only_keys: bool = False):
    """Prepares for reading one section.

    Args:
      only_keys: Whether only `leaves` are wanted: no options are made, and
        rules for several keys together are not checked.
    """
    self.problems: list[str] = []
    self.leaves: list[Leaf] = []
    self._only_keys = only_keys

  def check(self) -> None:
    """Raises OptionError with all problems, keys set in vain among them."""
    idle = [
      no_effect(leaf.path, leaf.value, leaf.idle)
      for leaf in self.leaves
      if leaf.idle is not None and leaf.changed
    ]
    if self.problems or idle:
      raise OptionError(self.problems + idle)

  def options(
    self,
    cls: type[T],
    default: Options | None,
    config: Mapping[str, Any],
    path: str,
    idle: str | None = None,
    extra: tuple[str, ...] = (),
  ) -> T | None:
    """The options of a section; None where it has a problem.

    Args:
      cls: The class of the options.
      default: An instance with the defaults; None takes those of the class.
      config: The section.
      path: The dotted name of the section, with a dot at the end.
      idle: The reason why the section has no effect; None where it has one.
      extra: Keys of the section that are no options of the class.
    """
    before = len(self.problems)
    try:
      config = cls.spelled_out(config)
    except OptionError as error:
      self.problems += error.below(path).problems
    self._check_keys(cls, config, path, extra)
    values = {}
    for name, field in fields_of(cls).items():
      spec, usual = spec_of(field), default_of(field)
      if default is not None:
        usual = getattr(default, name)
      reason = idle
      if reason is None and not in_force(_values(cls, config), spec.when):
        reason = needs(spec.when, path)
      value = self._field(cls, field, usual, config, path, reason)
      values[name] = usual if reason is not None and idle is None else value
    if self._only_keys or idle is not None or len(self.problems) > before:
      return None
    try:
      return cls(**values)
    except OptionError as error:
      self.problems += error.below(path).problems
    return None

  def _check_keys(self, cls, config, path, extra):
    allowed_keys = [*fields_of(cls), *extra]
    for key in config:
      if key not in allowed_keys:
        names = [f'{path}{name}' for name in allowed_keys]
        self.problems.append(unknown_key_text(f'{path}{key}', names))

  def _field(self, cls, field, default, config, path, idle):
    name, spec = field.name, spec_of(field)
    key = f'{path}{name}'
    if spec.holds_entries:
      return self._entries(spec, default, config.get(name), f'{key}.')
    if spec.kinds is not None or isinstance(default, Options):
      section = config.get(name, {})
      if not isinstance(section, Mapping):
        self.problems.append(f'{key}={section!r} is no section')
        return None
      if spec.kinds is not None:
        return self.choice(spec.kinds, default, section, f'{key}.', idle, spec)
      return self.options(type(default), default, section, f'{key}.', idle)
    value = config.get(name, default)
    hint = types_of(cls)[name]
    if value is dataclasses.MISSING:  # as in a config's section
      value = None
    if isinstance(value, list):  # JSON has no tuples
      value = _tuples(value)
    self.leaves.append(Leaf(key, value, default, spec, idle))
    if idle is not None:
      return default
    if value is None and default in (dataclasses.MISSING, None):
      if default is dataclasses.MISSING:
        self.problems.append(
          f'{key} is missing: it has no default; give --config.{key}=...'
        )
      return None
    problem = value_problem(key, value, hint, spec)
    if problem is not None:
      self.problems.append(problem)
    elif hint is float:
      value = float(cast(Any, value))
    return value

  def _entries(self, spec, default, config, path):
    if config is None:
      return default
    entries = {}
    for name, entry in config.items():
      prefix = f'{path}{name}.'
      if not isinstance(entry, Mapping):
        self.problems.append(f'{path}{name}={entry!r} is no section')
        continue
      if KIND not in entry:
        self.problems.append(f'{path}{name} has no {KIND!r}')
        continue
      self.leaves.append(
        Leaf(f'{prefix}{KIND}', entry[KIND], entry[KIND], spec, None)
      )
      cls = self._class(spec.kinds, entry[KIND], prefix)
      if cls is not None:
        entries[name] = self._entry(spec.kinds, cls, entry, prefix)
    return entries

  def _entry(self, kinds, cls, entry, path):
    """The options of an entry, which may have keys of other kinds, too.

    An earlier layer of the config may have set them for the kind before.
    """
    others = {k: v for k, v in _foreign(kinds, cls).items() if k in entry}
    chosen = self.options(cls, None, entry, path, extra=(KIND, *others))
    reason = f'with {path}{KIND}={entry[KIND]!r}'
    for other, field in others.values():
      self._field(other, field, default_of(field), entry, path, reason)
    return chosen

  def _class(self, kinds, name, path):
    try:
      return kinds.get(name)
    except InputError as error:
      self.problems.append(f'{path}{KIND}={name!r}: {error}')
      return None

  def choice(
    self,
    kinds: Kinds,
    default: Options | None,
    config: Mapping[str, Any],
    path: str,
    idle: str | None = None,
    spec: Spec = Spec(),
  ) -> Options | None:
    """The options of the chosen kind; None where there is a problem.

    The arguments are those of `options`. Without `default` the section has to
    name a kind.
    """
    usual = kinds.name_of(default) if default is not None else None
    name = config.get(KIND, usual)
    if name is None:
      self.problems.append(
        f'{path}{KIND} is missing: it has no default; name a kind'
      )
      return None
    self.leaves.append(Leaf(f'{path}{KIND}', name, usual, spec, idle))
    cls = self._class(kinds, name, path)
    if cls is None:
      return None
    if kinds.inline:
      return self._inline(kinds, cls, name, default, config, path, idle)
    allowed_keys = [KIND, CUSTOM, *kinds.builtin]
    for key in config:
      if key not in allowed_keys:
        names = [f'{path}{n}' for n in allowed_keys]
        self.problems.append(unknown_key_text(f'{path}{key}', names))
    section_key = CUSTOM if name not in kinds.builtin else name
    if section_key != CUSTOM:
      self._no_custom(config, path, name)
    defaults = default if type(default) is cls else None
    section = config.get(section_key, {})
    chosen = self.options(cls, defaults, section, f'{path}{section_key}.', idle)
    reason = idle or f'with {path}{KIND}={name!r}'
    for other, other_cls in kinds.builtin.items():
      if other != name:
        section = config.get(other, {})
        self.options(other_cls, None, section, f'{path}{other}.', reason)
    return chosen

  def _inline(self, kinds, cls, name, default, config, path, idle):
    """The options of a kind that stand beside `kind`, or in `custom`."""
    foreign = _foreign(kinds, cls)
    defaults = default if isinstance(default, cls) else None
    section = {k: v for k, v in config.items() if k not in (KIND, CUSTOM)}
    if name in kinds.builtin:
      self._no_custom(config, path, name)
    else:
      section |= dict(config.get(CUSTOM, {}).items())
    chosen = self.options(cls, defaults, section, path, idle, tuple(foreign))
    reason = idle or f'with {path}{KIND}={name!r}'
    for other, field in foreign.values():
      self._field(other, field, default_of(field), config, path, reason)
    return chosen

  def _no_custom(self, config, path, name):
    for key in config.get(CUSTOM, {}):
      self.problems.append(
        f'{path}{CUSTOM}.{key} has no effect with {path}{KIND}={name!r}'
      )


def _foreign(kinds, cls):
  """The class and the field of each key that only kinds beside `cls` have."""
  foreign = {}
  for other in kinds.builtin.values():
    for key, field in fields_of(other).items():
      if key not in fields_of(cls):
        foreign.setdefault(key, (other, field))
  return foreign


def _values(cls, config):
  """A function from a key of a section to its value, or to its default.

  The value of a choice's section is the name of its kind.
  """
  fields = fields_of(cls)

  def value_of(name):
    value = config.get(name, default_of(fields[name]))
    if isinstance(value, Mapping) and KIND in value:
      return value[KIND]
    return value

  return value_of


def _tuples(value: Any) -> Any:
  if isinstance(value, tuple | list):
    return tuple(_tuples(item) for item in value)
  return value


def plain(value: Any) -> Any:
  """A value in the form in which values are compared: lists for tuples."""
  if isinstance(value, tuple | list):
    return [plain(item) for item in value]
  if isinstance(value, ConfigDict):
    return plain(value.to_dict())
  return value


ConfigDict = ml_collections.ConfigDict
T = TypeVar('T', bound=Options)


def read_options(cls: type[T], config: Section, path: str = '') -> T:
  """The options of a section, checked.

  Args:
    cls: The class.
    config: The section; keys that it lacks have their defaults.
    path: Prefix of names in messages, such as 'model.'.

  Raises:
    OptionError: The message lists all problems: unknown keys with the nearest
      name, wrong types, missing and bad values, options set without effect.
  """
  reader = Reader()
  options = reader.options(cls, None, as_mapping(config), path)
  reader.check()
  return cast(T, options)


def read_choice(kinds: Kinds, config: Section, path: str = '') -> Options:
  """The options of the kind that a choice's section names."""
  reader = Reader()
  options = reader.choice(kinds, None, as_mapping(config), path)
  reader.check()
  return cast(Options, options)


def leaves_of(cls: type[Options], config: Section) -> list[Leaf]:
  """Every key of a config, in the order of the dataclasses."""
  reader = Reader(only_keys=True)
  reader.options(cls, None, as_mapping(config), '')
  return reader.leaves


def choice_leaves(kinds: Kinds, config: Section, path: str = '') -> list[Leaf]:
  """Every key of a choice's section."""
  reader = Reader(only_keys=True)
  reader.choice(kinds, None, as_mapping(config), path)
  return reader.leaves


def settle(
  cls: type[Options], before: Section, after: ConfigDict
) -> tuple[ConfigDict, dict[str, Any]]:
  """`after` without earlier values that its later layer leaves no effect.

  A later layer of a config (a flag, an evaluation's overrides, a study's arm)
  may choose another kind. Options that an earlier layer had set for the kind
  before then have no effect, and get their defaults again. An option without
  effect that the later layer sets itself stays, and `read_options` refuses it.

  Args:
    cls: The class of the whole config.
    before: The config of the earlier layers.
    after: The config with the later layer, too.

  Returns:
    A locked copy of `after`, and by name the values that got their defaults.
  """
  earlier = {leaf.path: leaf for leaf in leaves_of(cls, before)}
  ignored = {
    leaf.path: leaf
    for leaf in leaves_of(cls, after)
    if _switched_off(leaf, earlier)
  }
  return _without(after, ignored), {p: x.value for p, x in ignored.items()}


def with_overrides(
  kinds: Kinds, chosen: T, overrides: Section, path: str
) -> tuple[T, dict[str, Any]]:
  """The options with nested overrides, which are a later layer (`settle`).

  Overrides may choose another kind. Those that belong to a part that the
  options lack (the dense twin has no capacity) are left out.

  Args:
    kinds: The kinds that `chosen` is chosen from.
    chosen: The options.
    overrides: Keys of the options' section, nested, with other values.
    path: Prefix of names in messages, such as 'model.'.

  Returns:
    The new options, and by name the values that are left out.

  Raises:
    OptionError: The message lists all problems of the overrides.
  """
  if not overrides:
    return chosen, {}
  before = choice_section(kinds, chosen)
  after = merge(before, overrides, path)
  earlier = {leaf.path: leaf for leaf in choice_leaves(kinds, before, path)}
  ignored = {
    leaf.path: leaf
    for leaf in choice_leaves(kinds, after, path)
    if _switched_off(leaf, earlier) or _never_on(leaf, earlier)
  }
  options: Any = read_choice(kinds, _without(after, ignored, path), path)
  return options, {p: leaf.value for p, leaf in ignored.items()}


def settle_overrides(
  list_leaves: Callable[[ConfigDict], list[Leaf]],
  before: Section,
  after: Section,
  overrides: Section,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Overrides without those that a later layer of the config leaves no effect.

  Args:
    list_leaves: Lists the keys of the section to which overrides apply.
    before: The section in the config of the earlier layers.
    after: The same section with the later layer, too.
    overrides: The overrides of the earlier layers, nested.

  Returns:
    The overrides that remain, and by name those that are removed.
  """
  settled, ignored = ConfigDict(cast(Any, overrides)).to_dict(), {}
  try:
    old_leaves, new_leaves = (
      {leaf.path: leaf for leaf in list_leaves(merge(base, settled))}
      for base in (
        ConfigDict(cast(Any, before)).lock(),
        ConfigDict(cast(Any, after)).lock(),
      )
    )
  except OptionError:  # raised again where the overrides are read
    return settled, {}
  for path, value in flatten(settled).items():
    if path not in new_leaves or path not in old_leaves:
      continue
    if new_leaves[path].idle is not None and old_leaves[path].idle is None:
      ignored[path] = value
      *parents, key = path.split('.')
      subsection = settled
      for parent in parents:
        subsection = subsection[parent]
      del subsection[key]
  return settled, ignored


def _switched_off(leaf: Leaf, earlier: Mapping[str, Leaf]) -> bool:
  """Whether an earlier layer set the key and a later took its effect."""
  old = earlier.get(leaf.path)
  if leaf.idle is None or not leaf.changed or old is None:
    return False
  return old.idle is None and plain(old.value) == plain(leaf.value)


def _never_on(leaf: Leaf, earlier: Mapping[str, Leaf]) -> bool:
  """Whether the key belongs to a part that the options lack, and is set."""
  old = earlier.get(leaf.path)
  return leaf.idle is not None and leaf.changed and bool(old and old.unmet)


def _without(
  config: ConfigDict, ignored: Mapping[str, Leaf], path: str = ''
) -> ConfigDict:
  """A locked copy in which the keys `ignored` have their defaults."""
  copied = unlocked_copy(config)
  for name, leaf in ignored.items():
    _set_value(copied, name.removeprefix(path), leaf.default)
  if config.is_locked:  # sections that are open in it stay open
    return locked_like(copied, config)
  return copied.lock()


def _set_value(config: ConfigDict, path: str, value: Any) -> None:
  *parents, key = path.split('.')
  for parent in parents:
    config = cast(ConfigDict, config[parent])
  with config.ignore_type(), config.unlocked():
    if value is dataclasses.MISSING:
      value = None
    config[key] = value


def flatten(config: Section, prefix: str = '') -> dict[str, Any]:
  """The values of a config by dotted name: `{'model.width': 64, ...}`."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ConfigDict) and len(value):
      flat |= flatten(value, f'{prefix}{key}.')
    elif not isinstance(value, Mapping | ConfigDict):
      flat[f'{prefix}{key}'] = value
  return flat


def difference(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
  """The dotted keys whose values differ, as (old, new); absent is None."""
  old, new = flatten(old), flatten(new)
  return {
    key: (old.get(key), new.get(key))
    for key in sorted(old.keys() | new.keys())
    if plain(old.get(key)) != plain(new.get(key))
  }


ConfigDict = ml_collections.ConfigDict


def merge(config: ConfigDict, overrides: Section, path: str = '') -> ConfigDict:
  """A locked copy of `config` with nested `overrides` merged in.

  Raises:
    ValueError: An override's key does not exist (names the nearest), or its
      value has another type than the one it replaces.
  """
  merged = unlocked_copy(config)
  _merge_into(merged, config, overrides, path)
  return locked_like(merged, config)


def unlocked_copy(
  config: ConfigDict, memo: dict[int, Any] | None = None
) -> ConfigDict:
  """A deep copy of a section, unlocked.

  `copy.deepcopy` takes several times as long: it asks each section for
  attributes that do not exist, and the section then looks for similar names.

  Args:
    config: The section.
    memo: The copies by `id` of what was copied before, which `copy.deepcopy`
      shares.
  """
  memo = {} if memo is None else memo
  copied = memo[id(config)] = ConfigDict(type_safe=config.is_type_safe)
  for key, value in config.items(preserve_field_references=True):
    if not isinstance(value, ConfigDict):
      copied[key] = copy.deepcopy(value, memo)
    elif id(value) in memo:
      copied[key] = memo[id(value)]
    else:
      copied[key] = unlocked_copy(value, memo)
  return copied


def _merge_into(
  merged: ConfigDict, config: ConfigDict, overrides: Section, path: str
) -> None:
  """Merges `overrides` into an unlocked copy of `config`; see `merge`."""
  for key, value in overrides.items():
    key_path = f'{path}{key}'
    if key not in merged:
      if not config.is_locked and path:  # an open section
        merged[key] = value
        continue
      keys = [f'{path}{k}' for k in merged]
      raise OptionError([unknown_text('config key', key_path, keys)])
    old = config[key]
    if not isinstance(old, ConfigDict):
      merged[key] = _replaced(old, value, key_path)
    elif isinstance(value, Mapping | ConfigDict):
      _merge_into(cast(ConfigDict, merged[key]), old, value, f'{key_path}.')
    else:
      raise OptionError(
        [f'{key_path}={value!r} replaces a section; give its keys: {[*old]}']
      )


def locked_like(merged: ConfigDict, config: ConfigDict) -> ConfigDict:
  """`merged`, a copy of `config`, locked wherever that is.

  It may lack keys of mappings that have got their defaults again.
  """
  if config.is_locked:
    merged.lock()  # sections below it, too
  for key, subsection in config.items():
    if isinstance(subsection, ConfigDict) and key in merged:
      merged_subsection = cast(ConfigDict, merged[key])
      if not subsection.is_locked:
        merged_subsection.unlock()
      locked_like(merged_subsection, subsection)
  return merged


def _replaced(old: Any, value: Any, key_path: str) -> Any:
  if isinstance(old, float) and type(value) is int:
    value = float(value)
  if isinstance(old, tuple) and isinstance(value, list):
    value = tuple(value)
  if old is not None and type(old) is not type(value):
    raise OptionError(
      [
        f'{key_path}={value!r} is a {type(value).__name__}, '
        f'its default {old!r} a {type(old).__name__}'
      ]
    )
  return value


ConfigDict = ml_collections.ConfigDict


def section_of(options: type[Options] | Options) -> ConfigDict:
  """The section of a class at its defaults, or with an instance's values.

  It is locked against new keys, except where it is open: entries by name,
  mappings, and `custom`.
  """
  cls = options if isinstance(options, type) else type(options)
  return lock(cls, ConfigDict(_section(options)))


def lock(cls: type[Options], config: ConfigDict) -> ConfigDict:
  """The same section, locked except where it is open; see `section_of`."""
  config.lock()
  _unlock_open(cls, config)
  return config


def choice_section(kinds: Kinds, chosen: Options) -> ConfigDict:
  """The section of a choice alone, locked like that of `section_of`."""
  config = ConfigDict(_choice_section(kinds, chosen))
  config.lock()
  _unlock_choice(kinds, config)
  return config


def entry_section(kinds: Kinds, chosen: Options) -> ConfigDict:
  """The section of one of several named choices: its kind and its options."""
  return ConfigDict({KIND: kinds.name_of(chosen), **_section(chosen)})


def section_meaning(options: Options, path: str = '') -> dict[str, Any]:
  """The options that decide which function is computed, by dotted name.

  Left out are options that only say how it is computed (see `Spec.how`), and
  those without effect. The name of a chosen kind has the key 'kind'.

  Args:
    options: The options.
    path: Prefix of every name, such as 'model.'.
  """
  values = {}
  for name, field in fields_of(type(options)).items():
    spec, value = spec_of(field), getattr(options, name)
    used = in_force(functools.partial(getattr, options), spec.when)
    if spec.how or not used:
      continue
    if isinstance(value, Options):
      if spec.kinds is not None:
        values[f'{path}{name}.{KIND}'] = spec.kinds.name_of(value)
      values |= section_meaning(value, f'{path}{name}.')
    else:
      values[f'{path}{name}'] = value
  return values


def _section(options: type[Options] | Options) -> dict[str, Any]:
  cls = options if isinstance(options, type) else type(options)
  values = {}
  for name, field in fields_of(cls).items():
    value = default_of(field)
    if not isinstance(options, type):
      value = getattr(options, name)
    spec = spec_of(field)
    if spec.holds_entries and spec.kinds is not None:
      values[name] = {
        key: {KIND: spec.kinds.name_of(entry), **_section(entry)}
        for key, entry in value.items()
      }
    elif spec.kinds is not None:
      values[name] = _choice_section(spec.kinds, value)
    elif isinstance(value, Options):
      values[name] = _section(value)
    elif value is dataclasses.MISSING:
      hint = types_of(cls)[name]
      values[name] = config_dict.placeholder(hint)
    else:
      values[name] = dict(value) if isinstance(value, Mapping) else value
  return values


def _choice_section(kinds: Kinds, chosen: Options) -> dict[str, Any]:
  name = kinds.name_of(chosen)
  values: dict[str, Any] = {KIND: name}
  chosen_values, custom_values = _section(chosen), {}
  for kind, cls in kinds.builtin.items():
    if not kinds.inline:
      values[kind] = chosen_values if kind == name else _section(cls)
    else:
      values |= {k: v for k, v in _section(cls).items() if k not in values}
  if kinds.inline:
    values |= {k: v for k, v in chosen_values.items() if k in values}
  if name not in kinds.builtin:
    custom_values = {
      k: v
      for k, v in chosen_values.items()
      if not kinds.inline or k not in values
    }
  return {**values, CUSTOM: custom_values}


def _unlock_open(cls: type, config: ConfigDict) -> None:
  for name, field in fields_of(cls).items():
    spec, subsection = spec_of(field), config[name]
    if not isinstance(subsection, ConfigDict):
      continue
    if spec.holds_entries:
      subsection.unlock()
    elif spec.kinds is not None:
      _unlock_choice(spec.kinds, subsection)
    elif isinstance(default_of(field), Mapping):
      subsection.unlock()
    else:
      _unlock_open(type(default_of(field)), subsection)


def _unlock_choice(kinds: Kinds, config: ConfigDict) -> None:
  sections: Any = config
  sections[CUSTOM].unlock()
  for kind, chosen in kinds.builtin.items():
    _unlock_open(chosen, config if kinds.inline else sections[kind])
