"""The products of rows and kernels, with a gradient fast on each platform.

A kernel's gradient is x^T dy. On a CPU the transposed rows are an array of
their own (`cpu.transposed`); other platforms fold the transpose into the
product at no cost. Where the rows are cheap to compute, as those of relu are,
the CPU folds the transpose, too: XLA would compute the rows again inside a
separate transpose, and that is slower still.
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


@checked
def rows_matmul(
  x: Float[Array, '*E R M'],
  w: Float[Array | np.ndarray, '*E M F'],
  precision: jax.lax.Precision | None = None,
  transposed_alone: bool = True,
) -> Float[Array, '*E R F']:
  """x @ w in the type of x: rows by one kernel, or each expert's by its own.

  A float32 kernel of a bfloat16 model gets a float32 gradient: the sum over
  rows is never rounded to bfloat16.

  Args:
    x: The rows.
    w: The kernels.
    precision: The precision of the product and of its two gradients.
      Accelerators multiply float32 in fewer bits unless it is HIGHEST.
    transposed_alone: Whether the gradient, on the CPU, transposes the rows
      into an array of their own; False folds the transpose into the product.
  """
  y = _product(x, w, precision, transposed_alone)
  return checkpoint_name(y, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, w, precision, transposed_alone):
  del transposed_alone
  return jnp.matmul(x, w.astype(x.dtype), precision=precision)


def _forward(x, w, precision, transposed_alone):
  return _product(x, w, precision, transposed_alone), (x, w)


def _backward(precision, transposed_alone, saved, dy):
  x, w = saved
  kernel = w.astype(dy.dtype).swapaxes(-1, -2)
  dx = jnp.matmul(dy, kernel, precision=precision)
  dw = functools.partial(_dw, precision=precision)
  dw = jax.lax.platform_dependent(
    x, dy, cpu=functools.partial(dw, alone=transposed_alone), default=dw
  )
  return dx, dw.astype(w.dtype)


def _dw(x, dy, precision, alone=False):
  x = cpu.transposed(x) if alone else x.swapaxes(-1, -2)
  return jnp.matmul(
    x, dy, precision=precision, preferred_element_type=jnp.float32
  )


_product.defvjp(_forward, _backward)
