"""How tokens move: from `[G, S, M]` to expert rows and back.

Every dispatcher has the same functions, `dispatch(x, routing)` and
`combine(rows, routing)`, equal in value and gradient on the same `Routing` or
`SlotRouting`.
Rows are `[E, R, M]`, R for each expert; or `[N, M]`, sorted by expert, where
`group_sizes(routing)` is not None but the rows of each, `[E]`.
"""

from types import ModuleType

from moe_jax.config import unknown
from moe_jax.dispatch import einsum, gather
from moe_jax.dispatch import sorted_rows as dropless

DISPATCHERS = {'dropless': dropless, 'einsum': einsum, 'gather': gather}


def get(name: str) -> ModuleType:
  """The dispatcher of that name; ValueError names those that exist."""
  if name not in DISPATCHERS:
    raise unknown('dispatch', name, DISPATCHERS)
  return DISPATCHERS[name]


__all__ = ['DISPATCHERS', 'dropless', 'einsum', 'gather', 'get']
