"""Dispatchers: how tokens `[G, S, M]` move to the rows of experts and back.

Every dispatcher is a module of the functions `dispatch(x, routing)` and
`combine(rows, routing)`, equal in value and gradient on the same `Routing` or
`SlotRouting`. The rows of `gather` and `einsum` are `[E, R, M]`, R for each
expert. Those of `sorted_rows` are `[N, M]`, sorted by expert, and its
`group_sizes(routing)`, `[E]`, says how many each expert has.
"""

from moe_jax.dispatch import einsum, gather, sorted_rows

__all__ = ['einsum', 'gather', 'sorted_rows']
