"""How tokens move: from `[G, S, M]` to expert rows `[E, R, M]` and back.

Every file has the same two functions, `dispatch(x, routing)` and
`combine(rows, routing)`, equal in value and gradient on the same `Routing`.
"""

from types import ModuleType

from moe_jax.config import unknown
from moe_jax.dispatch import einsum, gather

DISPATCHERS = {'einsum': einsum, 'gather': gather}


def get(name: str) -> ModuleType:
  """The dispatcher of that name; ValueError names those that exist."""
  if name not in DISPATCHERS:
    raise unknown('dispatch', name, DISPATCHERS)
  return DISPATCHERS[name]


__all__ = ['DISPATCHERS', 'einsum', 'gather', 'get']
