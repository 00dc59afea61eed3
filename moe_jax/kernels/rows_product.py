"""The products of rows and kernels, with a gradient fast on each platform.

A kernel's gradient is x^T dy. Accelerators fold the transpose into the product
at no cost; a CPU transposes first (`cpu.sum_over_rows`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.kernels import cpu
from moe_jax.shapes import Array, Float, checked

# The name under which a remat policy finds the results of products.
PRODUCT = 'rows_matmul'
# The name of those products alone whose activation makes hidden values.
HIDDEN = 'hidden'


@checked
def rows_matmul(
  x: Float[Array, '*E R M'],
  w: Float[Array | np.ndarray, '*E M F'],
  precision: jax.lax.Precision | None = None,
) -> Float[Array, '*E R F']:
  """x @ w in the type of x: rows by one kernel, or each expert's by its own.

  A float32 kernel of a bfloat16 model gets a float32 gradient: the sum over
  rows is never rounded to bfloat16.

  Args:
    x: The rows.
    w: The kernels.
    precision: The precision of the product and of its two gradients.
      Accelerators multiply float32 in fewer bits unless it is HIGHEST.
  """
  return checkpoint_name(_product(x, w, precision), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, w, precision):
  return jnp.matmul(x, w.astype(x.dtype), precision=precision)


def _forward(x, w, precision):
  return _product(x, w, precision), (x, w)


def _backward(precision, saved, dy):
  x, w = saved
  kernel = w.astype(dy.dtype).swapaxes(-1, -2)
  dx = jnp.matmul(dy, kernel, precision=precision)
  dw = jax.lax.platform_dependent(
    x,
    dy,
    cpu=functools.partial(cpu.sum_over_rows, precision=precision),
    default=functools.partial(_dw, precision=precision),
  )
  return dx, dw.astype(w.dtype)


def _dw(x, dy, precision):
  return jnp.matmul(
    x.swapaxes(-1, -2),
    dy,
    precision=precision,
    preferred_element_type=jnp.float32,
  )


_product.defvjp(_forward, _backward)
