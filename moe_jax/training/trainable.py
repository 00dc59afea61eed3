"""The parameters that train: an expression over their roles, and its effect.

    config.trainable = 'experts + router'

What does not train has no gradient computed, no state in the optimizer and no
share in clipping or decay. Not here: the roles (`layers/parameters.py`).
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from moe_jax.layers.parameters import Role
from moe_jax.options import Check, unknown
from moe_jax.partitioning import path_name

# The parts of a model that an expression names, by the roles of parameters.
_ROLE_OF = {
  'attention': 'attention',
  'embeddings': 'embedding',
  'experts': 'expert',
  'ffn': 'ffn',
  'gate': 'gate',
  'head': 'head',
  'lstm': 'lstm',
  'norms': 'norm',
  'router': 'router',
}
NAMES = ('all', 'non_experts', *_ROLE_OF)
_PATTERN = 're:'
_TERM = re.compile(r'\s*(?P<sign>[+-]?)\s*(?P<term>re:\S+|\w+)\s*')


def _terms(text: str) -> Iterator[tuple[bool, str]]:
  """The terms of an expression, each with whether it is added.

  Raises:
    ValueError: The text is no expression.
  """
  at = 0
  while at < len(text) or not at:
    match = _TERM.match(text, at)
    missing = match is None or (at and not match['sign'])
    if missing or (not at and match['sign'] == '+'):
      raise ValueError(
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
    at = match.end()


def _problem(text: str) -> str | None:
  try:
    list(_terms(text))
  except (ValueError, re.error) as error:
    return str(error)
  return None


@dataclasses.dataclass(frozen=True)
class _Expression(Check):
  """The rule that a text is an expression over the parts of a model."""

  def problem(self, name: str, value: str) -> str | None:
    """See `Check.problem`; it says what is wrong in the expression."""
    problem = _problem(value)
    return None if problem is None else f'{name}={value!r}: {problem}'


EXPRESSION = _Expression(
  'is no expression over the parts of a model', lambda text: not _problem(text)
)


@dataclasses.dataclass(frozen=True)
class Trained:
  """The parameters that train.

  Attributes:
    expression: The expression that selects them.
    names: The names of the parameters that train, such as 'layers/layer_0/w'.
  """

  expression: str
  names: frozenset[str]

  def part(
    self, tree: Any, is_leaf: Callable[[Any], bool] | None = None
  ) -> Any:
    """A tree like the parameters, with None for what does not train."""

    def one(path, leaf):
      return leaf if path_name(path) in self.names else None

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_leaf)

  def optimizer(
    self, inner: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    """An optimizer of all parameters, which keeps state for this part alone.

    Args:
      inner: The optimizer of trees that have None for what does not train.
    """

    def init(params):
      return inner.init(self.part(params))

    def update(grads, state, params):
      return inner.update(grads, state, self.part(params))

    return optax.GradientTransformation(init, update)


def whole(part: Any, params: Any) -> Any:
  """The parameters, with those of `part` in the places where it has any."""
  return jax.tree.map(
    lambda own, other: other if own is None else own,
    part,
    params,
    is_leaf=lambda leaf: leaf is None,
  )


def updated(params: Any, updates: Any) -> Any:
  """The parameters after updates, which are None for what does not train."""
  return jax.tree.map(
    lambda update, param: (
      param if update is None else optax.apply_updates(param, update)
    ),
    updates,
    params,
    is_leaf=lambda leaf: leaf is None,
  )


def select(expression: str, roles: Any) -> Trained:
  """The parameters that an expression selects.

  Args:
    expression: Terms that are added or taken away from left to right; one that
      begins with '-' takes away from all.
    roles: A tree like the parameters with the `Role` of each.

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
      raise ValueError(
        f'trainable={expression!r}: the model has no parameter of {term!r}; '
        f'have {have}'
      )
    chosen = chosen | names if added else chosen - names
  if not chosen:
    raise ValueError(f'trainable={expression!r} selects no parameter')
  return Trained(expression, frozenset(chosen))


def _names(term: str, by_name: dict[str, str]) -> set[str]:
  """The names of the parameters of a term."""
  if term.startswith(_PATTERN):
    pattern = re.compile(term.removeprefix(_PATTERN))
    return {name for name in by_name if pattern.search(name)}
  if term == 'all':
    return set(by_name)
  if term == 'non_experts':
    return {name for name, role in by_name.items() if role != 'expert'}
  return {name for name, role in by_name.items() if role == _ROLE_OF[term]}
