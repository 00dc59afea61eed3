"""Sections of a config from options, and options from sections.

A section mirrors a dataclass of `moe_jax.options`, nested in the same way. A
choice is a section with a `kind`, the options of each kind (in a section of
the kind's name, or inline beside `kind`), and an open section `custom` for the
options of a user's own class.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import ml_collections
from ml_collections import config_dict

from moe_jax.options import (
  Kinds,
  OptionError,
  Options,
  default_of,
  fields_of,
  in_force,
  spec_of,
  types_of,
  unknown_text,
)
from moe_jax.section_reader import (
  CUSTOM,
  KIND,
  Leaf,
  Reader,
  Section,
  as_mapping,
  plain,
)

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


def section(options: type[Options] | Options) -> ConfigDict:
  """The section of a class at its defaults, or with an instance's values.

  It is locked against new keys, except where it is open: entries by name,
  mappings, and `custom`.
  """
  cls = options if isinstance(options, type) else type(options)
  return lock(cls, ConfigDict(_section(options)))


def lock(cls: type[Options], config: ConfigDict) -> ConfigDict:
  """The same section, locked except where it is open; see `section`."""
  config.lock()
  _unlock_open(cls, config)
  return config


def choice_section(kinds: Kinds, chosen: Options) -> ConfigDict:
  """The section of a choice alone, locked like that of `section`."""
  config = ConfigDict(_choice_section(kinds, chosen))
  config.lock()
  _unlock_choice(kinds, config)
  return config


def entry_section(kinds: Kinds, chosen: Options) -> ConfigDict:
  """The section of one of several named choices: its kind and its options."""
  return ConfigDict({KIND: kinds.name_of(chosen), **_section(chosen)})


def meaning(options: Options, path: str = '') -> dict[str, Any]:
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
      values |= meaning(value, f'{path}{name}.')
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
