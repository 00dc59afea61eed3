"""From a section of a config to options: one pass that collects what is wrong.

Not here: how a section is made, merged or settled (`sections.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import ml_collections

from moe_jax.option_checks import UNLESS, in_force, needs
from moe_jax.options import (
  Kinds,
  OptionError,
  Options,
  Spec,
  default_of,
  fields_of,
  no_effect,
  spec_of,
  types_of,
  unknown_text,
  value_problem,
)

ConfigDict = ml_collections.ConfigDict
T = TypeVar('T', bound=Options)
# A ConfigDict is no Mapping.
Section = Mapping[str, Any] | ConfigDict

KIND, CUSTOM = 'kind', 'custom'


class Leaf(NamedTuple):
  """One key of a config.

  Attributes:
    path: Its dotted name.
    value: Its value.
    default: Its default; `dataclasses.MISSING` where it is required.
    spec: What its field says of it.
    idle: Why it has no effect, in words that follow 'has no effect'; None
      where it has one.
  """

  path: str
  value: Any
  default: Any
  spec: Spec
  idle: str | None

  @property
  def changed(self) -> bool:
    """Whether the value is another than the default."""
    if self.default is dataclasses.MISSING:
      return self.value not in (None, dataclasses.MISSING)
    return plain(self.value) != plain(self.default)

  @property
  def unmet(self) -> bool:
    """Whether a neighbour's value, not another kind, takes its effect."""
    return self.idle is not None and self.idle.startswith(UNLESS)


def as_mapping(config: Section) -> Mapping[str, Any]:
  """The values of a section as plain nested mappings, which are read faster."""
  return config.to_dict() if isinstance(config, ConfigDict) else config


class Reader:
  """One pass over a section; what is wrong is collected, not raised."""

  def __init__(self, *, only_keys: bool = False):
    """Starts a pass.

    Args:
      only_keys: Whether the pass lists keys and makes no options, so that rules
        that concern several keys together are not checked.
    """
    self.problems: list[str] = []
    self.leaves: list[Leaf] = []
    self._only_keys = only_keys

  def check(self) -> None:
    """Raises OptionError with all that is wrong, idle keys among it."""
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
    others: tuple[str, ...] = (),
  ) -> T | None:
    """An instance; None where something is wrong.

    Args:
      cls: Its class.
      default: An instance whose values are the defaults; None: the class's.
      config: The section.
      path: Its dotted name, with a dot at the end.
      idle: Why the whole section has no effect; None where it has one.
      others: Keys of the section that are not the class's.
    """
    before = len(self.problems)
    self._unknown(cls, config, path, others)
    values = {}
    for name, field in fields_of(cls).items():
      spec, own = spec_of(field), default_of(field)
      if default is not None:
        own = getattr(default, name)
      why = idle
      if why is None and not in_force(_values(cls, config), spec.when):
        why = needs(spec.when, path)
      value = self._field(cls, field, own, config, path, why)
      values[name] = own if why is not None and idle is None else value
    if self._only_keys or idle is not None or len(self.problems) > before:
      return None
    try:
      return cls(**values)
    except OptionError as error:
      self.problems += error.below(path).problems
    return None

  def _unknown(self, cls, config, path, others):
    have = [*fields_of(cls), *others]
    for key in config:
      if key not in have:
        names = [f'{path}{name}' for name in have]
        self.problems.append(unknown_text('config key', f'{path}{key}', names))

  def _field(self, cls, field, default, config, path, idle):
    name, spec = field.name, spec_of(field)
    where = f'{path}{name}'
    if spec.many:
      return self._entries(spec, default, config.get(name), f'{where}.')
    if spec.kinds is not None or isinstance(default, Options):
      below = config.get(name, {})
      if not isinstance(below, Mapping):
        self.problems.append(f'{where}={below!r} is no section')
        return None
      if spec.kinds is not None:
        return self.choice(spec.kinds, default, below, f'{where}.', idle, spec)
      return self.options(type(default), default, below, f'{where}.', idle)
    value = config.get(name, default)
    hint = types_of(cls)[name]
    if isinstance(value, list):  # JSON has no tuples
      value = _tuples(value)
    self.leaves.append(Leaf(where, value, default, spec, idle))
    if idle is not None:
      return default
    if value is None and default in (dataclasses.MISSING, None):
      if default is dataclasses.MISSING:
        self.problems.append(f'{where} is missing: it has no default')
      return None
    problem = value_problem(where, value, hint, spec)
    if problem is not None:
      self.problems.append(problem)
    elif hint is float:
      value = float(value)
    return value

  def _entries(self, spec, default, config, path):
    if config is None:
      return default
    chosen = {}
    for name, entry in config.items():
      where = f'{path}{name}.'
      if not isinstance(entry, Mapping):
        self.problems.append(f'{path}{name}={entry!r} is no section')
        continue
      if KIND not in entry:
        self.problems.append(f'{path}{name} has no {KIND!r}')
        continue
      self.leaves.append(
        Leaf(f'{where}{KIND}', entry[KIND], entry[KIND], spec, None)
      )
      cls = self._class(spec.kinds, entry[KIND], where)
      if cls is not None:
        chosen[name] = self.options(cls, None, entry, where, others=(KIND,))
    return chosen

  def _class(self, kinds, name, path):
    try:
      return kinds.get(name)
    except ValueError as error:
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
    """The options of the chosen kind; None where something is wrong."""
    usual = kinds.name_of(default) if default is not None else None
    name = config.get(KIND, usual)
    if name is None:
      self.problems.append(f'{path}{KIND} is missing: it has no default')
      return None
    self.leaves.append(Leaf(f'{path}{KIND}', name, usual, spec, idle))
    cls = self._class(kinds, name, path)
    if cls is None:
      return None
    if kinds.inline:
      return self._inline(kinds, cls, name, default, config, path, idle)
    have = [KIND, CUSTOM, *kinds.builtin]
    for key in config:
      if key not in have:
        names = [f'{path}{n}' for n in have]
        self.problems.append(unknown_text('config key', f'{path}{key}', names))
    for other, other_cls in kinds.builtin.items():
      if other != name:
        why = idle or f'with {path}{KIND}={name!r}'
        self.options(
          other_cls, None, config.get(other, {}), f'{path}{other}.', why
        )
    own = CUSTOM if name not in kinds.builtin else name
    if own != CUSTOM:
      self._no_custom(config, path, name)
    like = default if type(default) is cls else None
    return self.options(cls, like, config.get(own, {}), f'{path}{own}.', idle)

  def _inline(self, kinds, cls, name, default, config, path, idle):
    """A kind whose options stand beside `kind`, a user's own in `custom`."""
    known, foreign = fields_of(cls), {}
    for other in kinds.builtin.values():
      for key, field in fields_of(other).items():
        if key not in known:
          foreign.setdefault(key, (other, field))
    for other, field in foreign.values():
      why = idle or f'with {path}{KIND}={name!r}'
      self._field(other, field, default_of(field), config, path, why)
    like = default if isinstance(default, cls) else None
    below = {k: v for k, v in config.items() if k not in (KIND, CUSTOM)}
    if name in kinds.builtin:
      self._no_custom(config, path, name)
    else:
      below |= dict(config.get(CUSTOM, {}).items())
    return self.options(cls, like, below, path, idle, tuple(foreign))

  def _no_custom(self, config, path, name):
    for key in config.get(CUSTOM, {}):
      self.problems.append(
        f'{path}{CUSTOM}.{key} has no effect with {path}{KIND}={name!r}'
      )


def _values(cls, config):
  """The values of a section's keys, defaults where they are not there."""
  fields = fields_of(cls)

  def value(name):
    found = config.get(name, default_of(fields[name]))
    if isinstance(found, Mapping) and KIND in found:
      return found[KIND]
    return found

  return value


def _tuples(value: Any) -> Any:
  if isinstance(value, tuple | list):
    return tuple(_tuples(item) for item in value)
  return value


def plain(value: Any) -> Any:
  """A value that compares equal however it is stored: lists for tuples."""
  if isinstance(value, tuple | list):
    return [plain(item) for item in value]
  if isinstance(value, ConfigDict):
    return plain(value.to_dict())
  return value
