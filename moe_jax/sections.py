"""Sections of a config from options, and options from sections.

A section mirrors a dataclass of `moe_jax.options`, nested in the same way. A
choice is a section with a `kind`, the options of each kind (in a section of
the kind's name, or inline beside `kind`), and an open section `custom` for the
options of a user's own class.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import ml_collections

from moe_jax.option_checks import OptionError
from moe_jax.options import Kinds, Options
from moe_jax.section_merger import locked_like, merge, unlocked_copy
from moe_jax.section_reader import (
  Leaf,
  Reader,
  Section,
  as_mapping,
  plain,
)
from moe_jax.section_writer import (
  choice_section,
  entry_section,
  lock,
  meaning,
  section,
)

__all__ = [
  'ConfigDict',
  'choice_leaves',
  'choice_section',
  'difference',
  'entry_section',
  'flatten',
  'leaves',
  'lock',
  'meaning',
  'merge',
  'overridden',
  'read',
  'read_choice',
  'section',
  'settle',
  'settle_overrides',
]

ConfigDict = ml_collections.ConfigDict
T = TypeVar('T', bound=Options)


def read(cls: type[T], config: Section, path: str = '') -> T:
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
  """The options of the kind that a choice's section names; see `read`."""
  reader = Reader()
  options = reader.choice(kinds, None, as_mapping(config), path)
  reader.check()
  return cast(Options, options)


def leaves(cls: type[Options], config: Section) -> list[Leaf]:
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
  effect that the later layer sets itself stays, and `read` refuses it.

  Args:
    cls: The class of the whole config.
    before: The config of the earlier layers.
    after: The config with the later layer, too.

  Returns:
    A locked copy of `after`, and by name the values that got their defaults.
  """
  earlier = {leaf.path: leaf for leaf in leaves(cls, before)}
  ignored = {
    leaf.path: leaf
    for leaf in leaves(cls, after)
    if _switched_off(leaf, earlier)
  }
  return _without(after, ignored), {p: x.value for p, x in ignored.items()}


def overridden(
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
