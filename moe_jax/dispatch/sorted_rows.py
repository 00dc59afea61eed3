"""Dispatch without slots: rows sorted by expert, no more than are needed.

MegaBlocks, https://arxiv.org/abs/2211.15841. No expert has a capacity of its
own; all choices that the routing kept are moved, so a routing with room for
everyone drops nothing. The rows go to the products of `moe_jax.kernels`.
`moe_jax.routing.rows` decides the token in each row; `movement.py` moves rows,
and has their gradients.
"""

from moe_jax.dispatch import movement
from moe_jax.routing.assignments import TokenRouting
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float, Int32


@checked
def dispatch(
  x: Float[Array, 'G S M'], routing: TokenRouting
) -> Float[Array, 'N M']:
  """Copies tokens to rows: expert 0's first, in the order of the tokens.

  N is the most there can be, min(G * S * K, E * G * C); rows past the sum of
  `group_sizes` are zero. Where experts choose, N = E * G * C, and an expert's
  rows are in the order of its slots.
  """
  return movement.take(x, routing.sorted_rows())


@checked
def combine(
  rows: Float[Array, 'N M'], routing: TokenRouting
) -> Float[Array, 'G S M']:
  """The sum of each token's expert rows, weighted by its gates."""
  return movement.give_back(rows, routing.sorted_rows(), routing.group_size)


def group_sizes(routing: TokenRouting) -> Int32[Array, ' E']:
  """The number of rows of each expert: its kept choices in all groups."""
  return routing.rows_per_expert()
