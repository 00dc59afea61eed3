"""Reading of options from a section of a config; all problems are collected."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, cast

import ml_collections

from moe_jax.errors import InputError
from moe_jax.options import (
  UNLESS,
  Kinds,
  OptionError,
  Options,
  Spec,
  default_of,
  fields_of,
  in_force,
  needs,
  no_effect,
  spec_of,
  types_of,
  unknown_key_text,
  value_problem,
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
