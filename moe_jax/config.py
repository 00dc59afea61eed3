"""Options are fields of dataclasses, which the sections of a config mirror.

    @dataclasses.dataclass(frozen=True)
    class FfnOptions(Options):
      hidden: int = option(512, 'Width of the hidden layer.', minimum=1)

`section_of` makes a section, a locked ConfigDict, of a class or an instance;
`read_options` makes an instance of a section and names all problems at once.
Dataclasses and sections are nested in the same way. A choice is a section with
a key `kind`, the options of each kind (in a section of the kind's name, or
beside the key `kind`), and a section `custom` for the options of a user's own
class. `custom` is open: it takes any key, where other sections are locked.
"""

import abc
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
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self, Union, cast

import ml_collections
from ml_collections import config_dict

from moe_jax.errors import InputError

ConfigDict = ml_collections.ConfigDict
# A ConfigDict does not count as a Mapping.
Section = Mapping[str, Any] | ConfigDict
# Marks a method of a contract that every subclass has to define.
required = abc.abstractmethod
MISSING = dataclasses.MISSING
KIND, CUSTOM = 'kind', 'custom'
SEEDS = 2**32  # seeds are stored as unsigned numbers of 32 bits
_KEY = 'moe_jax'
# For each bound the comparison that a value must pass, and words and a bracket
# for messages. Lower bounds come first, as messages print ranges from left.
_BOUNDS = {
  'minimum': (operator.ge, 'at least', '['),
  'above': (operator.gt, 'above', '('),
  'maximum': (operator.le, 'at most', ']'),
  'below': (operator.lt, 'below', ')'),
}
_LARGEST = 3.4028235e38  # the largest number of float32
_FEW = 8  # names that are listed even where one of them is near


def unknown(noun: str, value: Any, names: Iterable[Any]) -> ValueError:
  """The error for an unknown name; it suggests the nearest and lists all.

  `noun` says what is named, such as 'router'; `names` are those that exist.
  """
  return InputError(unknown_text(noun, value, names))


def unknown_text(noun: str, value: Any, names: Iterable[Any]) -> str:
  """The message for an unknown name: the nearest name, and all names.

  `noun` says what is named, such as 'router'; `names` are those that exist.
  """
  names = sorted(str(name) for name in names)
  near = difflib.get_close_matches(str(value), names, n=1)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  return f'unknown {noun} {value!r}; {hint}have {names}'


def unknown_key_text(name: str, names: Iterable[str]) -> str:
  """The message for a key that no config has.

  Args:
    name: The dotted name of the key.
    names: The dotted names of keys that exist in its place; the message leaves
      out a long list if one of the names is near.
  """
  names = list(names)
  text, _, have = unknown_text('config key', name, names).partition('? have ')
  if not have:
    return text
  is_short = len(names) <= _FEW
  return (
    f'{text}? {"have " + have if is_short else "--describe prints all keys"}'
  )


class OptionError(InputError):
  """All problems of some options, in one error.

  Attributes:
    problems: A text for each problem, once, which begins with the option's
      dotted name.
  """

  def __init__(self, problems: Iterable[str]):
    # Encoder and decoder may have the same problem, which is listed once.
    self.problems = tuple(dict.fromkeys(problems))
    super().__init__('\n'.join(self.problems))

  def __reduce__(self):
    return type(self), (self.problems,)

  def below(self, path: str) -> 'OptionError':
    """This error with `path` put before the name of every option."""
    return OptionError(type(text)(f'{path}{text}') for text in self.problems)


class InVain(str):
  """The problem of an option that is set where it has no effect."""


@dataclasses.dataclass(frozen=True)
class Option:
  """Description of an option, kept in the metadata of its dataclass field.

  Attributes:
    sentence: A sentence on the option, with its unit and the meaning of zero.
    minimum: The least number that is allowed. This bound and the next three
      also hold for every number of a tuple.
    maximum: The largest number that is allowed.
    above: The number that every allowed number is above.
    below: The number that every allowed number is below.
    choices: The values that are allowed; () allows all of the type.
    required: Whether an empty text or tuple is refused.
    same_function: Whether the option says how something is computed, started or
      trained, so that outside of training it does not change what parameters
      compute, except for rounding.
    kinds: The kinds to choose from; None for an option that is no choice.
    holds_entries: Whether the option holds several choices, each of which has a
      name that the user gives.
  """

  sentence: str = ''
  minimum: float | None = None
  maximum: float | None = None
  above: float | None = None
  below: float | None = None
  choices: tuple[Any, ...] = ()
  required: bool = False
  same_function: bool = False
  kinds: 'Kinds | None' = None
  holds_entries: bool = False

  def problem(self, name: str, value: Any) -> str | None:
    """The message for a value that breaks a bound; None for an allowed one."""
    if self.choices and value not in self.choices:
      return f'{name}={value!r}: {unknown_text(name, value, self.choices)}'
    if self.required and not value:
      return f'{name}={value!r} must be given'
    each = value if isinstance(value, tuple) else (value,)
    bounds = [
      (bound, *about)
      for attribute, about in _BOUNDS.items()
      if (bound := getattr(self, attribute)) is not None
    ]
    if all(keeps(v, bound) for v in each for bound, keeps, *_ in bounds):
      return None
    if len(bounds) == 1:
      ((bound, _, words, _),) = bounds
      rule = f'must be {words} {bound}'
    else:
      (low, _, _, left), (high, _, _, right) = bounds
      rule = f'not in {left}{low}, {high}{right}'
    return f'{name}={value!r}{": each" * (each is value)} {rule}'


def option(default: Any = MISSING, sentence: str = '', **bounds: Any) -> Any:
  """A field of an `Options` dataclass.

  Args:
    default: The default value; without it, a value is required. If it is an
      instance of `Options`, the config has a nested section for the field.
    sentence: A sentence on the option, with its unit and the meaning of zero.
    **bounds: The bounds of allowed values, and other attributes of `Option`.
  """
  return _field(default, Option(sentence, **bounds))


def choice(
  kinds: 'Kinds', default: 'str | Options', sentence: str, **attributes: Any
) -> Any:
  """A field that holds the options of the chosen kind.

  Args:
    kinds: The kinds to choose from.
    default: The name of the default kind, or its options.
    sentence: A sentence on what is chosen.
    **attributes: Other attributes of `Option`.
  """
  if isinstance(default, str):
    default = kinds.builtin[default]()
  return _field(default, Option(sentence, kinds=kinds, **attributes))


def entries(
  kinds: 'Kinds', default: Mapping[str, 'Options'], sentence: str
) -> Any:
  """A field that holds any number of choices, each under a name the user gives.

  A config may add keys to the field's section: entries, such as evaluations,
  each with a key `kind` and the options of this kind beside it.
  """
  return _field(default, Option(sentence, kinds=kinds, holds_entries=True))


def _field(default: Any, described: Option) -> Any:
  metadata = {_KEY: described}
  if isinstance(default, Mapping):  # which cannot be hashed
    return dataclasses.field(
      default_factory=lambda: dict(default), metadata=metadata
    )
  return dataclasses.field(default=default, metadata=metadata)


class Field(NamedTuple):
  """A field of a dataclass of options.

  Attributes:
    name: The name of the field.
    type: The type of the field, forward references resolved.
    default: The default of the field; MISSING where a value is required.
    option: The description of the field.
  """

  name: str
  type: Any
  default: Any
  option: Option


@functools.cache
def fields_of(cls: type) -> Mapping[str, Field]:
  """The fields of a dataclass that its constructor takes, by name."""
  hints, fields = typing.get_type_hints(cls), {}
  for field in dataclasses.fields(cls):
    factory = field.default_factory
    default = field.default if factory is MISSING else factory()
    described = field.metadata.get(_KEY, Option())
    if field.init:
      values = field.name, hints[field.name], default, described
      fields[field.name] = Field(*values)
  return fields


@dataclasses.dataclass(frozen=True, eq=False)
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

  noun: str
  base: type
  builtin: Mapping[str, type]
  inline: bool = False

  def get(self, name: str) -> type:
    """The class of options that a config means by `name`.

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

  def others(self, cls: type) -> dict[str, Field]:
    """The options that other built-in kinds have and `cls` lacks, by name."""
    fields = {}
    for other in self.builtin.values():
      fields = dict(fields_of(other)) | fields
    return {k: field for k, field in fields.items() if k not in fields_of(cls)}


def load_class(name: str, noun: str, base: type) -> type:
  """The class that 'module:name' names.

  Args:
    name: An importable module and a class in it, 'package.module:Class'.
    noun: The noun for the class in messages: 'router'.
    base: The class that the named class has to extend.

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
  contract = f'{base.__module__}.{base.__name__}'
  if cls is None:
    raise InputError(f'{noun} {name!r}: {module_name} has no {attribute!r}')
  if not (isinstance(cls, type) and issubclass(cls, base)):
    raise InputError(f'{noun} {name!r} does not extend {contract}')
  if '__dataclass_fields__' not in vars(cls):
    raise InputError(
      f'{noun} {name!r} is no dataclass, so that its options are unknown; put '
      '@dataclasses.dataclass(frozen=True) above it'
    )
  if missing := ', '.join(sorted(cls.__abstractmethods__)):
    raise InputError(
      f'{noun} {name!r} does not define {missing}, which {contract} asks of it'
    )
  return cls


class Options(abc.ABC):  # noqa: B024 - contracts that extend it are abstract
  """Base of dataclasses of options, which are checked when they are made.

  An `OptionError` then lists all problems of the fields. A subclass adds rules
  that concern several fields in `problems`. Its docstring gets the sentences of
  all fields, which notebooks and `help` show.
  """

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(**kwargs)
    fields = dict(getattr(cls, '__dataclass_fields__', {})) | vars(cls)
    sentences = [
      f'  {name}: {field.metadata[_KEY].sentence}'
      for name, field in fields.items()
      if isinstance(field, dataclasses.Field) and _KEY in field.metadata
    ]
    if sentences and cls.__doc__:
      cls.__doc__ += '\n\nOptions:\n' + '\n'.join(sentences)

  def __new__(cls, *args: Any, **values: Any) -> Self:
    """Refuses arguments that are no fields, and names the nearest fields.

    Raises:
      OptionError: Some arguments are no fields; the message lists all of them.
    """
    del args
    if wrong := values and values.keys() - fields_of(cls).keys():
      noun = f'option of {cls.__name__}'
      raise OptionError(
        unknown_text(noun, name, fields_of(cls)) for name in sorted(wrong)
      )
    return super().__new__(cls)

  def __post_init__(self):
    """Raises OptionError with all problems of the values."""
    texts = []
    for name, field in fields_of(type(self)).items():
      value = getattr(self, name)
      if isinstance(value, numbers.Integral) and not isinstance(value, int):
        value = operator.index(value)  # an integer of numpy
        object.__setattr__(self, name, value)
      if problem := value_problem(name, value, field):
        texts.append(problem)
      elif isinstance(value, int) and field.type is float:
        object.__setattr__(self, name, float(value))
    # Rules for several fields assume that each field is valid by itself.
    if texts := texts or list(self.problems()):
      raise OptionError(texts)

  def problems(self) -> Iterator[str]:
    """Yields a text for each problem that several fields have together."""
    return iter(())

  def in_vain(self, reason: str, *names: str) -> Iterator[str]:
    """Yields a problem for each named field that differs from its default.

    Args:
      reason: The reason, in words that follow 'has no effect'.
      *names: The names of fields; without names, all fields are meant.
    """
    for name, field in fields_of(type(self)).items():
      value = getattr(self, name)
      if name in (names or (name,)) and value != field.default:
        yield no_effect(name, value, reason)

  @classmethod
  def spelled_out(cls, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section with short notations, if the class has any, written out.

    Raises:
      OptionError: A notation is wrong.
    """
    return section

  def shrunk(self, **changes: Any) -> Self:
    """These options at a laptop's size, for a config with ':runlocal'.

    A class with sizes overrides this; by default nested options are shrunk.

    Args:
      **changes: The fields with sizes that an overriding method gives, by name.
    """
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


def no_effect(name: str, value: Any, reason: str) -> InVain:
  """The message that a value 'has no effect', which the words `reason` end."""
  return InVain(f'{name}={value!r} has no effect {reason}')


def value_problem(name: str, value: Any, field: Field) -> str | None:
  """The problem of one value, judged without others; None for a valid value."""
  described, assignment = field.option, f'{name}={value!r}'
  if (kinds := described.kinds) is not None:
    if described.holds_entries:
      if not isinstance(value, Mapping):
        return f'{assignment} is a {type(value).__name__}, not a mapping'
      bad = [n for n, v in value.items() if not isinstance(v, kinds.base)]
      return f'{name}.{bad[0]} is no {kinds.noun}' if bad else None
    if isinstance(value, kinds.base):
      return None
    class_names = sorted(cls.__name__ for cls in kinds.builtin.values())
    return f'{assignment} is no {kinds.base.__name__}; have {class_names}'
  if not of_type(value, field.type):
    hint = field.type
    hint = hint.__name__ if isinstance(hint, type) else hint
    return f'{assignment} is a {type(value).__name__}, not {hint}'
  signed = (described.below or 0) < SEEDS
  if rule := _number_problem(value, field.type is not float, signed):
    return f'{assignment} {rule}'
  return described.problem(name, value)


def of_type(value: Any, hint: Any) -> bool:
  """Whether a value has a field's type; a float may be an int, but no bool."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, Union):
    return any(of_type(value, part) for part in args)
  if origin is tuple:
    if not isinstance(value, tuple):
      return False
    if len(args) == 2 and args[1] is Ellipsis:
      return all(of_type(item, args[0]) for item in value)
    return len(value) == len(args) and all(map(of_type, value, args))
  if origin is not None:
    return isinstance(value, origin)
  if hint is Any:
    return True
  if hint in (int, float) and isinstance(value, bool):
    return False
  return isinstance(value, int | float if hint is float else hint)


def _number_problem(
  value: Any, whole: bool = True, signed: bool = True
) -> str | None:
  """The reason why an array cannot hold a value's numbers; None if it can.

  Args:
    value: The value, a number or a tuple of numbers.
    whole: Whether an integer is stored as an integer, not as a float.
    signed: Whether an integer is stored with a sign, which takes one bit.
  """
  if isinstance(value, tuple):
    return next(filter(None, map(_number_problem, value)), None)
  if isinstance(value, int) and whole:
    if -(2**31) <= value < 2 ** (31 if signed else 32):
      return None
    return "does not fit into JAX's integers of 32 bits"
  if not isinstance(value, int | float):
    return None
  if not math.isfinite(value):
    return 'must be finite'
  if abs(value) > _LARGEST:
    return f'is infinite in float32, whose largest number is {_LARGEST}'
  return None


def section_of(
  options: type[Options] | Options, kinds: Kinds | None = None
) -> ConfigDict:
  """The config's section of a class of options, or of an instance's values.

  The section is locked against new keys, except in sections whose keys the user
  names: entries, mappings, and `custom`.

  Args:
    options: The class or instance.
    kinds: The kinds that the instance is chosen from, for the section of a
      choice, which has a key `kind` and the options of the other kinds, too.
  """
  values = _section(options) if kinds is None else _choice(kinds, options)
  return lock(kinds or _class_of(options), ConfigDict(values))


def lock(root: type[Options] | Kinds, config: ConfigDict) -> ConfigDict:
  """Locks a section against new keys, but not entries, mappings, `custom`.

  `root` is the section's class, or the kinds that it chooses from. Returns the
  same section.
  """
  config.lock()
  _unlock_open(root, config)
  return config


def entry_section(kinds: Kinds, chosen: Options) -> ConfigDict:
  """The config's section of an entry: its `kind`, and that kind's options."""
  return ConfigDict({KIND: kinds.name_of(chosen), **_section(chosen)})


def _class_of(options: type[Options] | Options) -> type[Options]:
  return options if isinstance(options, type) else type(options)


def _section(options: type[Options] | Options) -> dict[str, Any]:
  values = {}
  for name, field in fields_of(_class_of(options)).items():
    is_class, kinds = isinstance(options, type), field.option.kinds
    value = field.default if is_class else getattr(options, name)
    if kinds is not None and field.option.holds_entries:
      values[name] = {k: entry_section(kinds, v) for k, v in value.items()}
    elif kinds is not None:
      values[name] = _choice(kinds, value)
    elif isinstance(value, Options):
      values[name] = _section(value)
    elif value is MISSING:
      values[name] = config_dict.placeholder(field.type)
    else:
      values[name] = dict(value) if isinstance(value, Mapping) else value
  return values


def _choice(kinds: Kinds, chosen: Any) -> dict[str, Any]:
  name, values = kinds.name_of(chosen), _section(chosen)
  is_custom = name not in kinds.builtin
  if not kinds.inline:
    sections = {
      kind: values if kind == name else _section(cls)
      for kind, cls in kinds.builtin.items()
    }
    return {KIND: name, **sections, CUSTOM: values if is_custom else {}}
  usual = {}
  for cls in kinds.builtin.values():
    usual = _section(cls) | usual
  own = {key: value for key, value in values.items() if key not in usual}
  shared = {key: value for key, value in values.items() if key in usual}
  return {KIND: name, **usual, **shared, CUSTOM: own if is_custom else {}}


def _unlock_open(root: type | Kinds, config: Any) -> None:
  """Lets entries, mappings and `custom` in a section, at any depth, grow.

  `root` is the class of the section, or the kinds that it chooses from.
  """
  if isinstance(root, Kinds):
    config[CUSTOM].unlock()
    for kind, cls in root.builtin.items():
      _unlock_open(cls, config if root.inline else config[kind])
    return
  for name, field in fields_of(root).items():
    if isinstance(field.default, Mapping):
      config[name].unlock()
    elif field.option.kinds is not None:
      _unlock_open(field.option.kinds, config[name])
    elif isinstance(field.default, Options):
      _unlock_open(type(field.default), config[name])


class Key(NamedTuple):
  """One key of a config.

  Attributes:
    path: The dotted name of the key.
    value: The value of the key.
    default: The default; MISSING where a value is required.
    option: The description of the option; for the key `kind` of a choice, that
      of the choice.
    unchosen: The choice because of which the key has no effect, in words such
      as 'with model.kind='lstm''; None where the key has an effect.
  """

  path: str
  value: Any
  default: Any
  option: Option
  unchosen: str | None

  @property
  def changed(self) -> bool:
    """Whether the value differs from the default."""
    if self.default is MISSING:
      return self.value not in (None, MISSING)
    return plain(self.value) != plain(self.default)


def read_options(root: Any, section: Section, path: str = '') -> Any:
  """The options that a section of a config gives, checked.

  Args:
    root: The class of the options, or the kinds that the section chooses from.
    section: The section; keys that it lacks have their defaults.
    path: Prefix of names in messages, such as 'model.'.

  Raises:
    OptionError: The message lists all problems: unknown keys with the nearest
      name, wrong types, missing and bad values, and what is set in a section
      that is not chosen.
  """
  reader = _Reader()
  options = reader.read(root, section, path)
  in_vain = [
    no_effect(key.path, key.value, key.unchosen)
    for key in reader.keys
    if key.unchosen and key.changed
  ]
  if reader.problems or in_vain:
    raise OptionError(reader.problems + in_vain)
  return options


def keys_of(
  root: type[Options] | Kinds, section: Section, path: str = ''
) -> list[Key]:
  """Every key of a section, in the order of fields; `path` begins each name."""
  reader = _Reader(only_keys=True)
  reader.read(root, section, path)
  return reader.keys


def settle(
  root: type[Options] | Kinds,
  config: ConfigDict,
  given: Collection[str],
  path: str = '',
) -> tuple[ConfigDict, dict[str, Any]]:
  """A copy of a config without the options that have lost their effect.

  A config is made in layers: a file, and over it flags, an evaluation's
  overrides or a study's arm. The last layer may choose another kind than the
  one that earlier layers have set options for, or switch off what other options
  are for; in the copy such options have their defaults.

  Args:
    root: The class of the config, or the kinds that it chooses from.
    config: The config with all layers.
    given: Dotted names of what the last layer sets. These values stay, also
      where they have no effect, so that `read_options` refuses them.
    path: Prefix of names, such as 'model.'.

  Returns:
    A locked copy, and by name the values that defaults have replaced.
  """
  reader = _Reader()
  reader.read(root, config, path)
  settled: Any = _copied(config)
  ignored: dict[str, Any] = {}
  in_vain = [x for x in reader.problems if isinstance(x, InVain)]
  names = tuple(f'{text.partition("=")[0]}.' for text in in_vain)
  for key in reader.keys:
    is_idle = key.unchosen or f'{key.path}.'.startswith(names)
    if not (key.changed and is_idle and not _is_given(key.path, given)):
      continue
    ignored[key.path] = key.value
    *parents, name = key.path.removeprefix(path).split('.')
    parent = settled
    for section in parents:
      parent = parent[section]
    with parent.ignore_type():
      if CUSTOM in parents:
        del parent[name]
      else:
        parent[name] = None if key.default is MISSING else key.default
  # An option may hold overrides of other options, as an evaluation's
  # `model_overrides` do. The problem of an overridden option begins with the
  # name of the option that holds the overrides, a colon, and its own name.
  for text in in_vain:
    holder, colon, name = text.partition('=')[0].partition(': ')
    if not colon or _is_given(holder, given):
      continue
    parents = f'{holder.removeprefix(path)}.{name}'.split('.')
    last, parent = parents.pop(), settled
    for section in parents:
      parent = parent.get(section, {})
    if last in parent:
      ignored[f'{holder}.{name}'] = parent[last]
      del parent[last]
  return settled, ignored


def _is_given(path: str, given: Collection[str]) -> bool:
  """Whether `given` has `path`, a section around it or a key in it, dotted."""
  path += '.'
  names = (f'{name}.' for name in given)
  return any(name.startswith(path) or path.startswith(name) for name in names)


def layered(
  root: type[Options] | Kinds,
  config: ConfigDict,
  overrides: Section,
  path: str = '',
) -> ConfigDict:
  """A locked copy of a config with one more layer of nested overrides.

  Options that lose their effect by the overrides get their defaults.
  `root` is the class of the config, or the kinds that it chooses from; `path`
  is the prefix of names in messages, such as 'model.'.

  Raises:
    OptionError: A key does not exist, or a value has another type.
  """
  merged = merge(config, overrides, path)
  return settle(root, merged, flatten(overrides, path), path)[0]


def overridden(
  root: Any, options: Any, overrides: Section, path: str = ''
) -> Any:
  """The options with nested overrides, which may choose other kinds.

  Args:
    root: The class of the options, or the kinds that they are chosen from.
    options: The options.
    overrides: Keys of the options' section, nested, with other values.
    path: Prefix of names in messages, such as 'model.'.

  Raises:
    OptionError: The message lists all problems of the overrides.
  """
  kinds = root if isinstance(root, Kinds) else None
  config = section_of(options, kinds)
  return read_options(root, layered(root, config, overrides, path), path)


class _Reader:
  """Reads a config's section into options; lists its keys and its problems."""

  def __init__(self, only_keys: bool = False):
    self.problems: list[str] = []
    self.keys: list[Key] = []
    self._only_keys = only_keys

  def read(self, root: Any, section: Section, path: str) -> Any:
    """The options, of class or kinds `root`, of a section; None if wrong."""
    if isinstance(section, ConfigDict):  # whose keys are slow to read
      section = section.to_dict()
    if isinstance(root, Kinds):
      return self._choice(root, None, section, path)
    return self._options(root, None, section, path)

  def _options(self, cls, default, section, path, unchosen=None, beside=()):
    """The options of a class, read from a section; None if there is a problem.

    Args:
      cls: The class.
      default: An instance with the defaults; None takes those of the class.
      section: The section.
      path: The dotted name of the section, with a dot at the end.
      unchosen: The choice because of which the section has no effect; None if
        it has an effect.
      beside: Names of keys of the section that are no options of the class.
    """
    before = len(self.problems)
    if not self._is_section(section, path):
      return None
    try:
      section = cls.spelled_out(section)
    except OptionError as error:
      self.problems += error.below(path).problems
    self._check_names(path, section, [*fields_of(cls), *beside])
    values = {}
    for name, field in fields_of(cls).items():
      usual = field.default if default is None else getattr(default, name)
      field = field._replace(default=usual)
      values[name] = self._value(field, section, path, unchosen)
    if self._only_keys or unchosen or len(self.problems) > before:
      return None
    try:
      return cls(**values)
    except OptionError as error:
      self.problems += error.below(path).problems
    return None

  def _check_names(self, path, section, names):
    paths = [f'{path}{name}' for name in names]
    for key in section:
      if key not in names:
        self.problems.append(unknown_key_text(f'{path}{key}', paths))

  def _value(self, field, section, path, unchosen):
    """A field's value in the section at `path`; notes the key and problems.

    `path` ends in a dot, or is ''; `unchosen` is the choice because of which
    the section has no effect, or None.
    """
    described, default, path = field.option, field.default, path + field.name
    value = section.get(field.name, default)
    if described.holds_entries:
      return self._entries(field, value, f'{path}.')
    if described.kinds is not None or isinstance(default, Options):
      subsection = {} if value is default else value
      if described.kinds is None:
        cls, arguments = type(default), (default, subsection, f'{path}.')
        return self._options(cls, *arguments, unchosen)
      arguments = described.kinds, default, subsection, f'{path}.'
      return self._choice(*arguments, unchosen, described)
    value = None if value is MISSING else _tuples(value)  # JSON has no tuples
    self.keys.append(Key(path, value, default, described, unchosen))
    if unchosen or (value is None and default is None):
      return default
    if value is None and default is MISSING:
      self.problems.append(
        f'{path} is missing: it has no default; give --config.{path}=...'
      )
    elif problem := value_problem(path, value, field):
      self.problems.append(problem)
    return dict(value) if isinstance(value, Mapping) else value

  def _choice(
    self, kinds, default, section, path, unchosen=None, described=Option()
  ):
    """The options of the kind that a section names, or of the default kind.

    A section that is an entry has the options of its kind alone, and maybe
    some of another kind, which were set before the kind was overridden. The
    result is None if there is a problem. `default` has the options of the
    default kind, None if there is none; `path` is the dotted name of the
    section, with a dot at the end; `unchosen` is the choice because of which
    the section has no effect, or None; `described` describes the choice.
    """
    if not self._is_section(section, path):
      return None
    is_entry = described.holds_entries
    usual = None if default is None else kinds.name_of(default)
    name = section.get(KIND, usual)
    if name is None:
      self.problems.append(
        f'{path}{KIND} is missing: it has no default; name a kind'
      )
      return None
    usual = name if is_entry else usual
    self.keys.append(Key(f'{path}{KIND}', name, usual, described, unchosen))
    try:
      cls = kinds.get(name)
    except InputError as error:
      self.problems.append(f'{path}{KIND}={name!r}: {error}')
      return None
    reason = unchosen or f'with {path}{KIND}={name!r}'
    custom = {} if is_entry else section.get(CUSTOM, {})
    if not self._is_section(custom, f'{path}{CUSTOM}.'):
      return None
    own = name if name in kinds.builtin else CUSTOM
    for key, value in custom.items() if own != CUSTOM else ():
      key = f'{path}{CUSTOM}.{key}'
      self.keys.append(Key(key, value, MISSING, Option(), reason))
    if kinds.inline or is_entry:
      beside = (KIND,) if is_entry else (KIND, CUSTOM)
      values = {k: v for k, v in section.items() if k not in beside}
      values |= custom if own == CUSTOM else {}
      default = default if isinstance(default, cls) else None
      others = kinds.others(cls)
      if is_entry:
        others = {k: field for k, field in others.items() if k in section}
      chosen = self._options(cls, default, values, path, unchosen, others)
      for field in others.values():
        self._value(field, section, path, reason)
      return chosen
    self._check_names(path, section, [KIND, CUSTOM, *kinds.builtin])
    default = default if type(default) is cls else None
    values = section.get(own, {})
    chosen = self._options(cls, default, values, f'{path}{own}.', unchosen)
    for kind, other in kinds.builtin.items():
      if kind != own:
        values = section.get(kind, {})
        self._options(other, None, values, f'{path}{kind}.', reason)
    return chosen

  def _is_section(self, section, path):
    if isinstance(section, Mapping):
      return True
    name = path[:-1] or 'config'
    self.problems.append(f'{name}={section!r} is no section')
    return False

  def _entries(self, field, section, path):
    """The options of each entry of a field made by `entries`, by name.

    `path` is the dotted name of the section, with a dot at the end.
    """
    chosen, kinds = {}, field.option.kinds
    if not self._is_section(section, path):
      return None
    for name, entry in section.items():
      if isinstance(entry, Options):  # a default
        entry = {KIND: kinds.name_of(entry), **_section(entry)}
      arguments = kinds, None, entry, f'{path}{name}.', None, field.option
      chosen[name] = self._choice(*arguments)
    return chosen


def _tuples(value: Any) -> Any:
  if isinstance(value, tuple | list):
    return tuple(map(_tuples, value))
  return value


def plain(value: Any) -> Any:
  """The value, for comparisons, as lists and dicts: no tuple, no ConfigDict."""
  if isinstance(value, tuple | list):
    return [plain(item) for item in value]
  return plain(value.to_dict()) if isinstance(value, ConfigDict) else value


def flatten(config: Section, prefix: str = '') -> dict[str, Any]:
  """The values of a config by `prefix` + name: `{'model.width': 64, ...}`."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ConfigDict) and len(value):
      flat |= flatten(value, f'{prefix}{key}.')
    elif not isinstance(value, Mapping | ConfigDict):
      flat[f'{prefix}{key}'] = value
  return flat


def difference(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
  """The dotted keys whose values differ, as (old, new); None where absent."""
  old, new = flatten(old), flatten(new)
  return {
    key: (old.get(key), new.get(key))
    for key in sorted(old.keys() | new.keys())
    if plain(old.get(key)) != plain(new.get(key))
  }


def merge(config: ConfigDict, overrides: Section, path: str = '') -> ConfigDict:
  """A copy of `config` with nested `overrides`, locked wherever `config` is.

  `path` is the prefix of names in messages, such as 'model.'.

  Raises:
    ValueError: An override's key does not exist (names the nearest), or its
      value has another type than the value that it replaces.
  """
  merged = _copied(config)
  _merge_into(merged, overrides, path)
  return merged


def _copied(config: ConfigDict) -> ConfigDict:
  """A copy of a config, locked wherever `config` is."""
  # `copy.deepcopy` of a ConfigDict takes several times as long.
  values = config.to_dict(preserve_field_references=True)
  return _locked_like(ConfigDict(copy.deepcopy(values)), config)


def _merge_into(merged: Any, overrides: Section, path: str):
  for key, value in overrides.items():
    key_path = f'{path}{key}'
    if key not in merged:
      if not merged.is_locked and path:  # an open section
        merged[key] = value
        continue
      names = [f'{path}{name}' for name in merged]
      raise OptionError([unknown_text('config key', key_path, names)])
    old = merged[key]
    if not isinstance(old, ConfigDict):
      merged[key] = _replaced(old, value, key_path)
    elif isinstance(value, Mapping | ConfigDict):
      _merge_into(old, value, f'{key_path}.')
    else:
      raise OptionError(
        [f'{key_path}={value!r} replaces a section; give its keys: {[*old]}']
      )


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


def _locked_like(merged: ConfigDict, config: ConfigDict) -> ConfigDict:
  """`merged`, a copy of `config`, locked wherever `config` is locked."""
  if config.is_locked:
    merged.lock()  # sections below it, too
  for key, subsection in config.items():
    if isinstance(subsection, ConfigDict):
      merged_subsection = cast(ConfigDict, merged[key])
      if not subsection.is_locked:
        merged_subsection.unlock()
      _locked_like(merged_subsection, subsection)
  return merged
