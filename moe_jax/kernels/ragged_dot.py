"""Products of rows grouped by expert, by XLA's own `ragged_dot`.

It is here to be compared with, and no platform's default: on a CPU it
multiplies every row by every expert, and so do its outer products on a TPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Float, Float32, Int32


def _dimensions(
  x: int, w: int, kernels: bool
) -> jax.lax.RaggedDotDimensionNumbers:
  """The dimension numbers of a product of rows with a second factor.

  Axis `x` of the rows is contracted with axis `w` of the second factor: kernels
  [E, _, _] if `kernels`, else rows that are grouped alike.
  """
  return jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([x], [w]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0] if kernels else [],
  )


def _dot(x, w, group_sizes, dimensions, dtype):
  y = jax.lax.ragged_dot_general(
    x, w, group_sizes, dimensions, preferred_element_type=jnp.float32
  )
  return y.astype(dtype)


def matmul(
  x: Float[Array, 'N _'],
  w: Float[Array, 'E _ _'],
  group_sizes: Int32[Array, ' E'],
  transposed: bool,
  dot: Callable[..., Array] = _dot,
) -> Float[Array, 'N _']:
  """x[n] @ w[e], or x[n] @ w[e].T if `transposed`, for each row n of group e.

  Rows are sorted by group; those past the last group come out zero. `dot` is
  the function (x, w, group sizes, dimension numbers, type) -> product of this
  type; the backend 'tokamax' has its own.
  """
  y = dot(
    x, w, group_sizes, _dimensions(1, 2 if transposed else 1, True), x.dtype
  )
  return _of_groups(y, group_sizes)


def outer(
  x: Float[Array, 'N M'],
  dy: Float[Array, 'N F'],
  group_sizes: Int32[Array, ' E'],
  dot: Callable[..., Array] = _dot,
) -> Float32[Array, 'E M F']:
  """The sum of x[n]^T dy[n] over the rows of each group, 0 if it has none.

  It is the gradient of kernels whose products with x have the gradient dy.
  `dot` is the function (x, dy, group sizes, dimension numbers, type) -> sums.
  """
  x, dy = _of_groups(x, group_sizes), _of_groups(dy, group_sizes)
  return dot(x, dy, group_sizes, _dimensions(0, 0, False), jnp.float32)


def _of_groups(x, group_sizes):
  """x with zeros in the rows past the last group, which may hold NaN."""
  row = jnp.arange(x.shape[0], dtype=jnp.int32)
  return jnp.where((row < group_sizes.sum())[:, None], x, 0)
