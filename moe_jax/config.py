"""From an ml_collections config to typed dataclasses, and overrides onto it.

Not here: the defaults, which are in `configs/base.py`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections

T = TypeVar('T')
# A ConfigDict is no Mapping.
Section = Mapping[str, Any] | ml_collections.ConfigDict


def unknown(what: str, value: Any, have) -> ValueError:
  """The error for a name that does not exist: names the nearest and all."""
  have = sorted(str(name) for name in have)
  near = difflib.get_close_matches(str(value), have, n=1)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  return ValueError(f'unknown {what} {value!r}; {hint}have {have}')


def to_dataclass(cls: type[T], config: Section, **more: Any) -> T:
  """Builds `cls` from a config section; nested dataclasses are the caller's.

  Args:
    cls: A dataclass.
    config: A section; every key must be a field of `cls`.
    **more: Fields given directly; they win over the section's.

  Raises:
    ValueError: A key is not a field (names the nearest), or a field that has
      no default is missing.
  """
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  values = {**dict(config.items()), **more}
  for key in values:
    if key not in fields:
      raise unknown(f'{cls.__name__} key', key, fields)
  missing = [
    name
    for name, field in fields.items()
    if name not in values
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(f'{cls.__name__} needs {missing}')
  return cls(**values)


def merge(
  config: ml_collections.ConfigDict, overrides: Section, path: str = ''
) -> ml_collections.ConfigDict:
  """A locked copy of `config` with nested `overrides` merged in.

  Raises:
    ValueError: An override's key does not exist (names the nearest), or its
      value has another type than the one it replaces.
  """
  merged = ml_collections.ConfigDict(config.to_dict()).unlock()
  for key, value in overrides.items():
    where = f'{path}{key}'
    if key not in merged:
      raise unknown('config key', where, [f'{path}{k}' for k in merged])
    old = merged[key]
    if isinstance(old, ml_collections.ConfigDict):
      if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise ValueError(f'{where}={value!r} replaces a section; give its keys')
      merged[key] = merge(old, value, f'{where}.')
      continue
    if isinstance(old, float) and type(value) is int:
      value = float(value)
    if old is not None and type(old) is not type(value):
      raise ValueError(
        f'{where}={value!r} is a {type(value).__name__}, '
        f'its default {old!r} a {type(old).__name__}'
      )
    merged[key] = value
  return ml_collections.ConfigDict(merged).lock()


def flatten(config: Section, prefix: str = '') -> dict[str, Any]:
  """`{'model.width': 64, ...}`: the leaves of a config by dotted name."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict) and len(value):
      flat |= flatten(value, f'{prefix}{key}.')
    elif not isinstance(value, Mapping | ml_collections.ConfigDict):
      flat[f'{prefix}{key}'] = value
  return flat


def difference(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
  """The dotted keys whose values differ, as (old, new); absent is None."""

  def plain(value):
    if isinstance(value, tuple | list):
      return [plain(item) for item in value]
    return value

  old, new = flatten(old), flatten(new)
  return {
    key: (old.get(key), new.get(key))
    for key in sorted(old.keys() | new.keys())
    if plain(old.get(key)) != plain(new.get(key))
  }
