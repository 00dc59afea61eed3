"""Sweeps as plain values: lists of flat overrides, `{'model.width': 64}`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.errors import InputError

Overrides = dict[str, Any]


def product(*sweeps: Mapping[str, Sequence[Any]]) -> list[Overrides]:
  """Every combination of the keys' values; the last key changes fastest.

  Raises:
    ValueError: A key is swept twice.
  """
  values: dict[str, Sequence[Any]] = {}
  for key, swept in (item for sweep in sweeps for item in sweep.items()):
    if key in values:
      raise InputError(f'{key} is swept twice')
    values[key] = swept
  return [
    dict(zip(values, chosen, strict=True))
    for chosen in itertools.product(*values.values())
  ]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Turns dotted names into nested dicts, as `config.merge` takes them.

  `{'model.width': 64}` becomes `{'model': {'width': 64}}`.

  Raises:
    ValueError: A key has a value and is also the section of another key.
  """
  tree: dict[str, Any] = {}
  for key, value in flat.items():
    *sections, name = key.split('.')
    section = tree
    for part in sections:
      section = section.setdefault(part, {})
      if not isinstance(section, dict):
        raise InputError(f'{key} is within {part}, which has a value')
    if name in section:
      raise InputError(f'{key} has a value and keys of its own')
    section[name] = value
  return tree
