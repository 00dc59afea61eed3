"""Trees of parameters as flat dicts, whose keys are paths of names.

Flax does the work; its own functions are typed for trees of arrays alone,
while ours also hold shapes, axes and roles.
"""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

Path = tuple[str, ...]


def flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
  """The leaves of a tree of dicts, by path."""
  return traverse_util.flatten_dict(tree)


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
  """The tree of dicts with these leaves, the inverse of `flatten`."""
  return traverse_util.unflatten_dict(leaves)
