"""Factors of weight decay and learning rate for each parameter.

A user's rules come first, then the default of a parameter's form. A rule is a
factor with a regular expression of names, or with 'part:' and an expression
over the parts of a model: 'part:attention - router'.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from moe_jax.config import Check
from moe_jax.errors import InputError
from moe_jax.layers.parameters import Role
from moe_jax.models.selection import EXPRESSION, names_of
from moe_jax.partitioning import path_name

# A regular expression, or 'part:' and an expression over parts; and a factor.
Pattern = tuple[str, float]
_PART = 'part:'


@dataclasses.dataclass(frozen=True)
class _Rules(Check):
  """The rule that values are pairs of an expression and a factor."""

  def problem(self, name: str, value: Any) -> str | None:
    """The message for rules, with what is wrong in an expression of parts."""
    for pair in value if self.holds(value) else ():
      expression = _parts_expression(pair[0])
      if expression is not None and (
        problem := EXPRESSION.problem(name, expression)
      ):
        return problem
    return super().problem(name, value)


def _parts_expression(pattern: str) -> str | None:
  """The expression over parts of a rule; None if it is one of names."""
  if not pattern.startswith(_PART):
    return None
  return pattern.removeprefix(_PART).strip()


def _are_patterns(rules: Sequence[Pattern]) -> bool:
  try:
    return all(re.compile(pattern) and factor >= 0 for pattern, factor in rules)
  except re.error:
    return False


PATTERNS = _Rules(
  'are not pairs of a regular expression and a factor of at least 0',
  _are_patterns,
)


def factors(
  option: str,
  rules: Sequence[Pattern],
  roles: Any,
  default: Callable[[Role], float],
) -> Any:
  """A tree of factors of the parameters.

  Args:
    option: The name of the option, for messages.
    rules: Patterns and factors; the first that selects a parameter counts.
    roles: A tree like the parameters with the `Role` of each.
    default: The factor of a parameter that no rule selects, by its role.

  Raises:
    ValueError: A rule names a part that the model lacks, or selects nothing.
  """
  selectors = [
    (_selects(option, pattern, roles), float(factor))
    for pattern, factor in rules
  ]

  def factor_of(path, role):
    name = path_name(path)
    for selects, factor in selectors:
      if selects(name):
        return factor
    return default(role)

  return jax.tree_util.tree_map_with_path(factor_of, roles, is_leaf=is_role)


def _selects(option: str, pattern: str, roles: Any) -> Callable[[str], bool]:
  """The function that says whether a rule selects the parameter of a name."""
  if (expression := _parts_expression(pattern)) is not None:
    return names_of(expression, roles, option).__contains__
  regex = re.compile(pattern)
  names = [
    path_name(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(roles, is_leaf=is_role)
  ]
  if not any(map(regex.search, names)):
    raise InputError(
      f'{option}: {pattern!r} is found in the name of no parameter; '
      f'{names[0]!r} is one'
    )
  return lambda name: regex.search(name) is not None


def is_role(leaf: Any) -> bool:
  """Whether a node of a tree is a `Role`, which is a leaf of it."""
  return isinstance(leaf, Role)
