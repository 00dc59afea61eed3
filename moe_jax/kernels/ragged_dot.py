"""The grouped products as XLA's own `ragged_dot`: for any platform.

Its cost depends on the platform: where XLA has no kernel for it, every row is
multiplied by every expert.
"""

import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Float, Float32, Int32


def matmul(
  x: Float[Array, 'N _'],
  w: Float[Array, 'E _ _'],
  group_sizes: Int32[Array, ' E'],
  transposed: bool,
) -> Float[Array, 'N _']:
  """x[n] @ w[e], or x[n] @ w[e].T, for each row n of group e."""
  y = _ragged_dot(x, w, group_sizes, (1, 2 if transposed else 1), (0,))
  # The rows that belong to no group hold unspecified values.
  return only_grouped(y.astype(x.dtype), group_sizes)


def outer(
  x: Float[Array, 'N M'],
  dy: Float[Array, 'N F'],
  group_sizes: Int32[Array, ' E'],
) -> Float32[Array, 'E M F']:
  """The sum of x[n]^T dy[n] over the rows of each group."""
  # A platform may multiply rows that belong to no group by zero, and 0 * NaN is
  # NaN.
  x, dy = only_grouped(x, group_sizes), only_grouped(dy, group_sizes)
  return _ragged_dot(x, dy, group_sizes, (0, 0), ())


def only_grouped(
  x: Float[Array, 'N _'], group_sizes: Int32[Array, ' E']
) -> Float[Array, 'N _']:
  """x with the rows past the sum of the group sizes made zero."""
  row = jnp.arange(x.shape[0], dtype=jnp.int32)
  return jnp.where((row < group_sizes.sum())[:, None], x, 0)


def _ragged_dot(
  lhs, rhs, group_sizes, contract, rhs_group
) -> Float32[Array, '...']:
  """One product over the axes `contract`; the rows of `lhs` come in groups.

  Under `vmap` the products run one after the other: JAX lacks some of the
  batched forms.
  """
  dimensions = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=rhs_group,
  )

  @jax.custom_batching.sequential_vmap
  def product(lhs, rhs, group_sizes):
    return jax.lax.ragged_dot_general(
      lhs, rhs, group_sizes, dimensions, preferred_element_type=jnp.float32
    )

  return product(lhs, rhs, group_sizes)
