"""Factors of weight decay and learning rate for each parameter.

The first of the user's rules that selects a parameter gives its factor; if none
does, the parameter's role gives a default. A rule is a factor with a regular
expression of names, or with 'part:' and an expression over the parts of a
model, such as 'part:attention - router'.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from moe_jax.errors import InputError
from moe_jax.layers.parameters import Role
from moe_jax.models.selection import expression_problems, names_of
from moe_jax.partitioning import path_name

# A rule: a regular expression, or 'part:' and an expression over parts; and the
# factor of the parameters that it selects.
Pattern = tuple[str, float]
_PART = 'part:'


def _parts_expression(pattern: str) -> str | None:
  """A rule's expression over parts; None for a rule by a regular expression."""
  if not pattern.startswith(_PART):
    return None
  return pattern.removeprefix(_PART).strip()


def rule_problems(option: str, rules: Sequence[Pattern]) -> Iterator[str]:
  """The problems of rules that need no model to be seen, a text for each.

  Args:
    option: The name of the option, for messages.
    rules: Patterns and factors.
  """
  for pattern, factor in rules:
    expression, assignment = _parts_expression(pattern), f'{option}={rules!r}'
    if expression is not None:
      yield from expression_problems(option, expression)
    else:
      try:
        re.compile(pattern)
      except re.error as error:
        yield f'{assignment}: {pattern!r} is no regular expression: {error}'
    if factor < 0:
      yield f'{assignment}: the factor {factor} must be at least 0'


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
  selectors = [(_selects(option, p, roles), float(f)) for p, f in rules]

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
  leaves = jax.tree_util.tree_leaves_with_path(roles, is_leaf=is_role)
  names = [path_name(path) for path, _ in leaves]
  if not any(map(regex.search, names)):
    raise InputError(
      f'{option}: {pattern!r} is found in the name of no parameter; '
      f'{names[0]!r} is one'
    )
  return lambda name: regex.search(name) is not None


def is_role(leaf: Any) -> bool:
  """Whether a node of a tree is a `Role`, which is a leaf of it."""
  return isinstance(leaf, Role)
