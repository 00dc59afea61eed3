"""The product of rows sorted by expert, each group by its own kernel.

The gradient is here, the loops are the backends'. MegaBlocks calls it grouped
matmul (https://arxiv.org/abs/2211.15841).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.errors import InputError
from moe_jax.kernels import backends
from moe_jax.shapes import Array, Float, Int32

# The name of the results in a remat policy.
PRODUCT = 'grouped_matmul'


def grouped_matmul(
  x: Float[Array, 'N M'],
  w: Float[Array | np.ndarray, 'E M F'],
  group_sizes: Int32[Array, ' E'],
  backend: str = 'auto',
) -> Float[Array, 'N F']:
  """y[n] = x[n] @ w[e], e the group that row n is in; in the type of x.

  The first group_sizes[0] rows are expert 0's, the next group_sizes[1] expert
  1's, and so on. Rows past their sum belong to no expert: they come out zero
  and their gradient is zero. Sums are float32; the gradient of a float32
  kernel is never rounded to the type of x. Derivatives are reverse-mode and
  first-order. On several devices no compiler splits it: call it on each, under
  `shard_map` with check_vma=False (`partitioning.on_each_device`).

  Args:
    x: The rows, sorted by expert.
    w: The kernel of each expert.
    group_sizes: The number of rows of each expert, at least 0 and in all at
      most N. This is not checked: the numbers are known only at run time.
    backend: One of `backends.BACKENDS`, or 'auto', the one of the platform.

  Raises:
    ValueError: Shapes do not fit, or the backend is unknown.
  """
  backends.check(backend)
  check_shapes(x, w, group_sizes)
  x, group_sizes = jnp.asarray(x), jnp.asarray(group_sizes)
  return checkpoint_name(_product(x, w, group_sizes, backend), PRODUCT)


def check_shapes(x, w, group_sizes) -> None:
  """Raises ValueError where rows, kernels and groups do not fit."""
  ranks = np.ndim(x), np.ndim(w), np.ndim(group_sizes)
  if ranks != (2, 3, 1):
    raise InputError(
      f'rows {np.shape(x)}, kernels {np.shape(w)} and group sizes '
      f'{np.shape(group_sizes)} must be [N, M], [E, M, F] and [E]'
    )
  if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise InputError(f'group sizes of {group_sizes.dtype} must be integers')
  if x.shape[-1] != w.shape[1]:
    raise InputError(
      f'rows of width {x.shape[-1]} by kernels {w.shape}: the width must be '
      f'M={w.shape[1]}'
    )
  if group_sizes.shape[0] != w.shape[0]:
    raise InputError(
      f'{group_sizes.shape[0]} group sizes for {w.shape[0]} experts'
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x, w, group_sizes, backend):
  return backends.matmul(x, w.astype(x.dtype), group_sizes, False, backend)


def _forward(x, w, group_sizes, backend):
  return _product(x, w, group_sizes, backend), (x, w, group_sizes)


def _backward(backend, saved, dy):
  x, w, group_sizes = saved
  kernel = w.astype(dy.dtype)
  dx = backends.matmul(dy, kernel, group_sizes, True, backend)
  dw = backends.outer(x, dy, group_sizes, backend)
  return dx, dw.astype(w.dtype), None


_product.defvjp(_forward, _backward)
