"""One-hot dispatch, as GShard prints it: the readable reference.

https://arxiv.org/abs/2006.16668, section 3.2. It costs O(S E C M) per group,
which grows with the square of the group size; use it to check the others.
"""

import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.routing.rows import without_nan
from moe_jax.routing.soft_rule import AnyRouting
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float


@checked
def dispatch(
  x: Float[Array, 'G S M'], routing: AnyRouting
) -> Float[Array, 'E R M']:
  """Copies tokens to the rows of experts; R = G * C, empty slots are zero.

  Raises:
    ValueError: The routing is unbounded: a mask needs a capacity.
  """
  send = routing.slot_shares()
  # A product would spread a NaN of a token that no expert serves: 0 * NaN.
  x = without_nan(send.any((2, 3)), x)
  rows = jnp.einsum('GSEC,GSM->EGCM', send.astype(x.dtype), x)
  return rows.reshape(len(rows), -1, rows.shape[-1])


@checked
def combine(
  rows: Float[Array, 'E R M'], routing: AnyRouting
) -> Float[Array, 'G S M']:
  """The sum of each token's expert rows, weighted by its gates."""
  weight = routing.slot_weights()
  G, _, E, C = weight.shape
  if rows.shape[1] != G * C:
    raise InputError(
      f'rows has shape {rows.shape}; the routing has {(E, G * C)} of them'
    )
  rows = rows.reshape(E, G, C, -1)
  return jnp.einsum('GSEC,EGCM->GSM', weight.astype(rows.dtype), rows)
