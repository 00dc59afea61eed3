"""What this package knows of one architecture of transformers.

Not here: the architectures themselves, a file each.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.interop.config_keys import Keys, Values
from moe_jax.interop.mapping import Names

# A `model` section's values, nested.
Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One `model_type`.

  Attributes:
    model_type: As in config.json.
    classes: What `architectures` may name; the first is written.
    keys: Of config.json.
    settings: The keys' values -> our `model` section and what is wrong.
    describe: The other way: a model's config -> the keys that it decides.
    names: Our parameters' tensors; see `mapping`.
    prefix: What tensors of the model without its head lack.
    computed: Patterns of tensors that hold what is computed anyway.
  """

  model_type: str
  classes: tuple[str, ...]
  keys: Keys
  settings: Callable[[Values], tuple[Settings, list[str]]]
  describe: Callable[[Any], dict[str, Any]]
  names: Names
  prefix: str = ''
  computed: tuple[str, ...] = ()


def activation(
  name: str, table: Mapping[str, str], key: str, problems: list[str]
) -> str:
  """Our name of an activation; what is not supported joins `problems`."""
  if name not in table:
    problems.append(f'{key}={name!r} is not supported, only {sorted(table)}')
  return table.get(name, 'relu')


def written(name: str, table: Mapping[str, str]) -> str:
  """Their first name of our activation; ours where they have none."""
  return next((theirs for theirs, ours in table.items() if ours == name), name)


def layers(sparse: list[int], num_layers: int) -> str:
  """Our string for sparse layers by number."""
  if len(sparse) in (0, num_layers):
    return 'all' if sparse else 'none'
  return ','.join(map(str, sparse))


def period(sparse: tuple[bool, ...], first: int) -> int | None:
  """The step of a pattern that is sparse at `first(step)`, + step, ...

  Args:
    sparse: A flag a layer.
    first: 0: the first sparse layer is step - 1; 1: it is layer 1.

  Returns:
    The step; None where no step gives the pattern.
  """
  for step in range(len(sparse) + 2):
    if tuple(is_sparse(i, step, first) for i in range(len(sparse))) == sparse:
      return step
  return None


def is_sparse(layer: int, step: int, first: int) -> bool:
  """Whether a layer is sparse under a step; none is under step 0.

  Args:
    layer: From 0.
    step: Every how many layers one is sparse.
    first: 0 as NLLB counts, 1 as Switch does.
  """
  if step <= 1:
    return step == 1
  return layer % step == (1 if first else step - 1)
