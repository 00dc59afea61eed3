"""Feed-forward experts on rows sorted by expert: both products and a gradient.

Where the backend is the loop over blocks, one loop does both products of a
block; elsewhere they are grouped products, one after the other.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.errors import InputError
from moe_jax.kernels import backends, blocks_ffn
from moe_jax.kernels.grouped_products import PRODUCT, check_shapes
from moe_jax.shapes import Array, Float, Int32


def grouped_ffn(
  x: Float[Array, 'N M'],
  w_ins: tuple[Float[Array | np.ndarray, 'E M F'], ...],
  w_out: Float[Array | np.ndarray, 'E F M'],
  group_sizes: Int32[Array, ' E'],
  hidden: Callable[..., Array],
  backend: str = 'auto',
) -> Float[Array, 'N M']:
  """y[n] = hidden(x[n] @ w_in[e], ...) @ w_out[e], e the group of row n.

  Rows, groups, types and backends are as in `grouped_matmul`.

  Args:
    x: The rows, sorted by expert.
    w_ins: The first kernels: one, or several whose products are multiplied.
    w_out: The last kernel.
    group_sizes: The number of rows of each expert, in all at most N.
    hidden: The elementwise function from the first products to the hidden
      values.
    backend: The name of the backend, as in `grouped_matmul`.

  Raises:
    ValueError: Shapes do not fit, or the backend is unknown.
  """
  backends.check(backend)
  for w in w_ins:
    check_shapes(x, w, group_sizes)
  E, M, F = w_ins[0].shape
  if w_out.shape != (E, F, M) or any(w.shape != (E, M, F) for w in w_ins):
    raise InputError(
      f'first kernels {[w.shape for w in w_ins]} and last {w_out.shape} must '
      'be [E, M, F] and [E, F, M]'
    )
  x, group_sizes = jnp.asarray(x), jnp.asarray(group_sizes)
  y = _ffn(x, w_ins, w_out, group_sizes, hidden, backend)
  return checkpoint_name(y, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ffn(x, w_ins, w_out, group_sizes, hidden, backend):
  return _forward(x, w_ins, w_out, group_sizes, hidden, backend)[0]


def _forward(x, w_ins, w_out, group_sizes, hidden, backend):
  cast = [w.astype(x.dtype) for w in (*w_ins, w_out)]

  def fused(x, *rest):
    *ins, out, sizes = rest
    return blocks_ffn.forward(x, tuple(ins), out, sizes, hidden)

  def composed(name):
    def run(x, *rest):
      *ins, out, sizes = rest
      firsts = tuple(backends.matmul(x, w, sizes, False, name) for w in ins)
      return backends.matmul(hidden(*firsts), out, sizes, False, name), firsts

    return run

  y, firsts = backends.choose(
    lambda name: fused if name == 'blocks' else composed(name),
    backend,
    x,
    *cast,
    group_sizes,
  )
  firsts = tuple(checkpoint_name(z, PRODUCT) for z in firsts)
  return y, (x, w_ins, w_out, group_sizes, firsts)


def _backward(hidden, backend, saved, dy):
  x, w_ins, w_out, group_sizes, firsts = saved
  cast = [w.astype(x.dtype) for w in (*w_ins, w_out)]
  n = len(w_ins)

  def fused(x, dy, sizes, *rest):
    ins, out, firsts = rest[:n], rest[n], rest[n + 1 :]
    return blocks_ffn.backward(x, ins, out, sizes, hidden, firsts, dy)

  def composed(name):
    def run(x, dy, sizes, *rest):
      ins, out, firsts = rest[:n], rest[n], rest[n + 1 :]
      h, pull = jax.vjp(hidden, *firsts)
      d_firsts = pull(backends.matmul(dy, out, sizes, True, name))
      dx = sum(
        backends.matmul(d, w, sizes, True, name) for d, w in zip(d_firsts, ins)
      )
      dw_ins = tuple(backends.outer(x, d, sizes, name) for d in d_firsts)
      return dx, dw_ins, backends.outer(h, dy, sizes, name)

    return run

  dx, dw_ins, dw_out = backends.choose(
    lambda name: fused if name == 'blocks' else composed(name),
    backend,
    x,
    dy,
    group_sizes,
    *cast,
    *firsts,
  )
  dw_ins = tuple(dw.astype(w.dtype) for dw, w in zip(dw_ins, w_ins))
  return dx, dw_ins, dw_out.astype(w_out.dtype), None


_ffn.defvjp(_forward, _backward)
