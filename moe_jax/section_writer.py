"""Writing of options as a section of a config, which can be read back."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from moe_jax.option_checks import in_force
from moe_jax.options import (
  Kinds,
  Options,
  default_of,
  fields_of,
  spec_of,
  types_of,
)
from moe_jax.section_reader import CUSTOM, KIND

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
