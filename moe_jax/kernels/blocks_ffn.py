"""A feed-forward layer's products in one loop over blocks, for the CPU.

Between its products a block's rows stay in the cache. The gradient is one
loop too. In it, hidden values of the next expert's rows are multiplied by zero:
one that is infinite makes its neighbour's gradient NaN too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.kernels import blocks
from moe_jax.shapes import Array, Float, Int32


def forward(
  x: Float[Array, 'N M'],
  w_ins: tuple[Float[Array, 'E M F'], ...],
  w_out: Float[Array, 'E F M'],
  group_sizes: Int32[Array, ' E'],
  hidden: Callable[..., Array],
) -> tuple[Float[Array, 'N M'], tuple[Float[Array, 'N F'], ...]]:
  """The output, and the first products for `backward`."""
  N, F = x.shape[0], w_out.shape[1]

  def body(block, kernels, carry):
    *ins, out = kernels
    y, firsts = carry
    rows = block.rows(x)
    products = [blocks.dot(rows, w, (1, 0)) for w in ins]
    firsts = tuple(block.write(z, p) for z, p in zip(firsts, products))
    return block.write(y, blocks.dot(hidden(*products), out, (1, 0))), firsts

  firsts = tuple(jnp.zeros((N, F), x.dtype) for _ in w_ins)
  carry = (jnp.zeros_like(x), firsts)
  kernels = (*w_ins, w_out)
  return blocks.for_each_block(body, carry, kernels, group_sizes, N)


def backward(
  x: Float[Array, 'N M'],
  w_ins: tuple[Float[Array, 'E M F'], ...],
  w_out: Float[Array, 'E F M'],
  group_sizes: Int32[Array, ' E'],
  hidden: Callable[..., Array],
  firsts: tuple[Float[Array, 'N F'], ...],
  dy: Float[Array, 'N M'],
) -> tuple:
  """The gradients of x, w_ins and w_out; those of kernels in float32."""

  def body(block, kernels, carry):
    *ins, out = kernels
    dx, dw_ins, dw_out = carry
    rows, d_rows = block.own_rows(x), block.own_rows(dy)
    h, pull = jax.vjp(hidden, *(block.rows(z) for z in firsts))
    # In the rows of other experts this is zero, as d_rows is; the values that
    # `forward` left there in `firsts` are finite.
    d_firsts = pull(blocks.dot(d_rows, out, (1, 1)))
    d_rows_in = [blocks.dot(d, w, (1, 1)) for d, w in zip(d_firsts, ins)]
    dw_ins = tuple(
      block.add(dw, blocks.dot_over_rows(rows, d))
      for dw, d in zip(dw_ins, d_firsts)
    )
    dw_out = block.add(dw_out, blocks.dot_over_rows(h, d_rows))
    return block.write(dx, sum(d_rows_in)), dw_ins, dw_out

  dw_ins = tuple(jnp.zeros(w.shape, jnp.float32) for w in w_ins)
  carry = (jnp.zeros_like(x), dw_ins, jnp.zeros(w_out.shape, jnp.float32))
  return blocks.for_each_block(
    body, carry, (*w_ins, w_out), group_sizes, x.shape[0]
  )
