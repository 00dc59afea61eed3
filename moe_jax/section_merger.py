"""Merging of overrides into a section of a config."""

import copy
from collections.abc import Mapping
from typing import Any, cast

import ml_collections

from moe_jax.option_checks import OptionError, unknown_text
from moe_jax.section_reader import Section

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
