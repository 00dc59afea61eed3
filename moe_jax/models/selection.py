"""Parts of a model by name: expressions over the roles of its parameters.

For example, `names_of('all - embeddings', roles)` gives the names of all
parameters except the embeddings.
"""

import re
from collections.abc import Iterator
from typing import Any

import jax

from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.layers.parameters import Role
from moe_jax.partitioning import path_name

# The names of parts of a model in an expression. All of them but 'all' and
# 'non_experts' are roles of parameters; a final s is not part of the role.
_ROLES = 'attention embeddings experts ffn gate head lstm norms router'
NAMES = ('all', 'non_experts', *_ROLES.split(), 'shared_experts')
_PATTERN = 're:'
_TERM = re.compile(r'\s*(?P<sign>[+-]?)\s*(?P<term>re:\S+|\w+)\s*')


def _terms(text: str) -> Iterator[tuple[bool, str]]:
  """Yields each term of an expression, after True if added, False if taken off.

  Raises:
    ValueError: The text is no expression.
  """
  start = 0
  while start < len(text) or not start:
    match = _TERM.match(text, start)
    if match is None or (
      match['sign'] == '+' if not start else not match['sign']
    ):
      raise InputError(
        f"{text!r} is no sum of parts, such as 'experts + router' or "
        f"'all - embeddings'; have {list(NAMES)}, or 're:' and a regular "
        'expression of names'
      )
    term = match['term']
    if term.startswith(_PATTERN):
      re.compile(term.removeprefix(_PATTERN))
    elif term not in NAMES:
      raise unknown('part of a model', term, [*NAMES, 're:...'])
    yield match['sign'] != '-', term
    start = match.end()


def expression_problems(name: str, text: str) -> Iterator[str]:
  """Yields a text if `text`, the value of option `name`, is no expression."""
  try:
    list(_terms(text))
  except (InputError, re.error) as error:
    yield f'{name}={text!r}: {error}'


def names_of(
  expression: str, roles: Any, option: str = 'trainable'
) -> frozenset[str]:
  """The names of the parameters that an expression selects.

  Args:
    expression: Terms that are added or taken away from left to right; an
      expression that begins with '-' takes away from all parameters.
    roles: A tree like the parameters with the `Role` of each.
    option: The name of the option that holds the expression, for messages.

  Raises:
    ValueError: The expression is wrong, names a part that the model lacks, or
      selects nothing.
  """
  leaves = jax.tree_util.tree_leaves_with_path(
    roles, is_leaf=lambda leaf: isinstance(leaf, Role)
  )
  by_name = {path_name(path): role.role for path, role in leaves}
  terms = list(_terms(expression))
  chosen = set(by_name) if not terms[0][0] else set()
  for added, term in terms:
    names = _names(term, by_name)
    if not names:
      have = sorted(n for n in NAMES if _names(n, by_name))
      raise InputError(
        f'{option}={expression!r}: the model has no parameter of {term!r}; '
        f'have {have}'
      )
    chosen = chosen | names if added else chosen - names
  if not chosen:
    raise InputError(f'{option}={expression!r} selects no parameter')
  return frozenset(chosen)


def _names(term: str, by_name: dict[str, str]) -> set[str]:
  """The names of the parameters that a term of an expression stands for.

  A term is a role, its plural, 'all', 'non_experts', or a pattern of names.
  `by_name` has the role of each parameter of the model by its name.
  """
  if term.startswith(_PATTERN):
    pattern = re.compile(term.removeprefix(_PATTERN))
    return {name for name in by_name if pattern.search(name)}
  if term == 'all':
    return set(by_name)
  if term == 'non_experts':
    return {name for name, role in by_name.items() if role != 'expert'}
  return {
    name for name, role in by_name.items() if role == term.removesuffix('s')
  }
