"""The products of rows and kernels, with a gradient each platform likes.

A kernel's gradient is x^T dy. XLA's CPU compiler turns it into a fast product
only if the transposed rows are an array of their own; left alone it folds the
transpose into a slow one. Other platforms fold it at no cost, and are left
alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.shapes import Array, Float

# What a remat policy calls the results.
PRODUCT = 'rows_matmul'


def rows_matmul(
  x: Float[Array, '*E R M'], w: Float[Array | np.ndarray, '*E M F']
) -> Float[Array, '*E R F']:
  """x @ w in the type of x: rows by one kernel, or each expert's by its own.

  A float32 kernel of a bfloat16 model gets a float32 gradient: the sum over
  rows is never rounded to bfloat16.
  """
  return checkpoint_name(_product(x, w), PRODUCT)


@jax.custom_vjp
def _product(x, w):
  return x @ w.astype(x.dtype)


def _forward(x, w):
  return _product(x, w), (x, w)


def _backward(saved, dy):
  x, w = saved
  dx = dy @ w.astype(dy.dtype).swapaxes(-1, -2)
  dw = jax.lax.platform_dependent(x, dy, cpu=_dw_cpu, default=_dw)
  return dx, dw.astype(w.dtype)


def _dw(x, dy):
  return jnp.matmul(x.swapaxes(-1, -2), dy, preferred_element_type=jnp.float32)


def _dw_cpu(x, dy):
  transposed = jax.lax.optimization_barrier(x.swapaxes(-1, -2))
  return jnp.matmul(transposed, dy, preferred_element_type=jnp.float32)


_product.defvjp(_forward, _backward)
