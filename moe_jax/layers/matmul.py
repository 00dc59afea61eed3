"""The products of rows and kernels, with a gradient each platform likes.

A kernel's gradient is x^T dy. XLA's CPU compiler turns it into a fast product
only if the transposed rows are an array of their own; left alone it folds the
transpose into a slow one. Other platforms fold it at no cost, and are left
alone.
"""

import jax

from moe_jax.shapes import Array, Float


@jax.custom_vjp
def rows_matmul(
  x: Float[Array, '*E R M'], w: Float[Array, '*E M F']
) -> Float[Array, '*E R F']:
  """x @ w: rows by one kernel, or each expert's rows by its own."""
  return x @ w


def _forward(x, w):
  return rows_matmul(x, w), (x, w)


def _backward(saved, dy):
  x, w = saved
  dw = jax.lax.platform_dependent(x, dy, cpu=_dw_cpu, default=_dw)
  return dy @ w.swapaxes(-1, -2), dw


def _dw(x, dy):
  return x.swapaxes(-1, -2) @ dy


def _dw_cpu(x, dy):
  return jax.lax.optimization_barrier(x.swapaxes(-1, -2)) @ dy


rows_matmul.defvjp(_forward, _backward)
