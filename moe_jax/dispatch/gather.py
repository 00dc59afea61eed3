"""Dispatch by index into static capacity buffers: the default, O(S K M).

Every expert has C rows in each group, filled or not; further choices are
dropped. `moe_jax.routing.rows` decides the token in each row; `movement.py`
moves rows, and has their gradients.
"""

from moe_jax.dispatch import movement
from moe_jax.routing.assignments import TokenRouting
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float


@checked
def dispatch(
  x: Float[Array, 'G S M'], routing: TokenRouting
) -> Float[Array, 'E R M']:
  """Copies tokens to the rows of experts; R = G * C, empty slots are zero.

  Raises:
    ValueError: The routing is unbounded: slots need a capacity.
  """
  return movement.take(x, routing.slot_rows())


@checked
def combine(
  rows: Float[Array, 'E R M'], routing: TokenRouting
) -> Float[Array, 'G S M']:
  """The sum of each token's expert rows, weighted by its gates."""
  return movement.give_back(rows, routing.slot_rows(), routing.group_size)
