"""Sweeps as plain values: lists of flat overrides, `{'model.width': 64}`.

chain(
  [{'model.moe.num_experts': 0}],
  product({'model.moe.num_selected': [1, 2]}, {'seed': [0, 1]}),
)
"""

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


def zipped(sweep: Mapping[str, Sequence[Any]]) -> list[Overrides]:
  """Combines the keys' first values, then their second ones, and so on.

  Raises:
    ValueError: The keys have different numbers of values.
  """
  lengths = {key: len(values) for key, values in sweep.items()}
  if len(set(lengths.values())) > 1:
    raise InputError(f'keys have different numbers of values: {lengths}')
  return [
    dict(zip(sweep, chosen, strict=True))
    for chosen in zip(*sweep.values(), strict=True)
  ]


def chain(*sweeps: Sequence[Mapping[str, Any]]) -> list[Overrides]:
  """All overrides of one sweep, then all of the next."""
  return [dict(overrides) for sweep in sweeps for overrides in sweep]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Turns dotted names into nested dicts, as `sections.merge` takes them.

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
