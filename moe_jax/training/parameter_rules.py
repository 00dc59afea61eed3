"""Factors of weight decay and learning rate for each parameter.

A user's patterns of names come first, then the default of a parameter's form.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax

from moe_jax.layers.parameters import Role
from moe_jax.options import Check
from moe_jax.partitioning import path_name

Pattern = tuple[str, float]  # a regular expression and a factor


def _are_patterns(rules: Sequence[Pattern]) -> bool:
  try:
    return all(re.compile(pattern) and factor >= 0 for pattern, factor in rules)
  except re.error:
    return False


PATTERNS = Check(
  'are not pairs of a regular expression and a factor of at least 0',
  _are_patterns,
)


def decay_factors(rules: Sequence[Pattern], roles: Any) -> Any:
  """A tree of factors of the weight decay: kernels alone decay by default.

  Args:
    rules: Patterns and factors; the first found in a parameter's name counts.
    roles: A tree like the parameters with the `Role` of each.
  """
  return _factors(rules, roles, lambda role: float(role.form == 'kernel'))


def rate_factors(rules: Sequence[Pattern], roles: Any) -> Any:
  """A tree of factors of the learning rate: 1 by default.

  Args:
    rules: Patterns and factors; the first found in a parameter's name counts.
    roles: A tree like the parameters with the `Role` of each.
  """
  return _factors(rules, roles, lambda role: 1.0)


def _factors(rules, roles, default):
  compiled = [(re.compile(pattern), float(factor)) for pattern, factor in rules]

  def one(path, role):
    name = path_name(path)
    for pattern, factor in compiled:
      if pattern.search(name):
        return factor
    return default(role)

  return jax.tree_util.tree_map_with_path(
    one, roles, is_leaf=lambda leaf: isinstance(leaf, Role)
  )
