"""Products of rows grouped by expert, in loops over blocks: the CPU backend.

Trip counts are dynamic, so neither unused experts nor padding cost anything,
and an expert's kernel is sliced out once, however many blocks it multiplies. An
expert's first block has the rows that its full blocks leave. Its size is one of
a few, rounded up, so that it alone may reach into rows of other experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels import cpu
from moe_jax.shapes import Array, Bool, Float, Float32, Int32

# Sizes of blocks in sixteenths of an expert's equal share of the rows. Near the
# share, where most experts are if the load is balanced, sizes are close to each
# other, so that 3 % of a block's rows are wasted; below, they are far apart.
# More sizes take longer to compile.
SIXTEENTHS = (2, 4, 8, *range(12, 21))
# The sizes of blocks are computed from an expert's equal share of the rows, but
# from at most _MOST_SHARE rows, and are rounded up to multiples of _MULTIPLE.
_MOST_SHARE, _MULTIPLE = 1024, 8


class Block(NamedTuple):
  """A few rows of one expert, which one round of the loop multiplies.

  Attributes:
    expert: int32 [], the index of the expert.
    start: int32 [], the first row that the block multiplies.
    first_own: int32 [], the block's first row that belongs to the expert.
    stop: int32 [], the row after the block's last that belongs to the expert.
    size: R, the number of rows that the block multiplies, of N in all.
    is_first: Whether the block is the expert's first block, which alone has
      rows of other experts, too.
  """

  expert: Array
  start: Array
  first_own: Array
  stop: Array
  size: int
  is_first: bool

  def rows(self, x: Float[Array, 'N M']) -> Float[Array, 'R M']:
    """The block's rows of x, whichever expert they belong to."""
    return jax.lax.dynamic_slice_in_dim(x, self.start, self.size)

  def own_rows(self, x: Float[Array, 'N M']) -> Float[Array, 'R M']:
    """The block's rows of x, in which rows of other experts are zero."""
    rows = self.rows(x)
    return jnp.where(self._own_mask(), rows, 0) if self.is_first else rows

  def write(
    self, x: Float[Array, 'N M'], rows: Float[Array, 'R M']
  ) -> Float[Array, 'N M']:
    """x with the block's rows written; rows of other experts stay."""
    if self.is_first:
      rows = jnp.where(self._own_mask(), rows, self.rows(x))
    return jax.lax.dynamic_update_slice_in_dim(x, rows, self.start, 0)

  def add(
    self, total: Float[Array, 'E M F'], part: Float[Array, 'M F']
  ) -> Float[Array, 'E M F']:
    """Adds `part`, the block's share of a sum, to total[expert].

    The expert's first block sets total[expert] to `part`.
    """
    if not self.is_first:
      part = part + jax.lax.dynamic_index_in_dim(total, self.expert, 0, False)
    return jax.lax.dynamic_update_index_in_dim(total, part, self.expert, 0)

  def _own_mask(self) -> Bool[Array, 'R 1']:
    row = self.start + jnp.arange(self.size, dtype=jnp.int32)
    return ((row >= self.first_own) & (row < self.stop))[:, None]


class KernelSums:
  """Sums over the rows of each expert of x^T dy, float32 [E, M, F].

  `total` is what the loop over blocks carries, 0 at first. While it does, the
  sums may be transposed, see `cpu.is_swapped`; `result` undoes this at once.
  """

  def __init__(self, num_rows: int, num_experts: int, width: int, d_width: int):
    rows = min(-(-num_rows // num_experts), _MOST_SHARE)
    self.swapped = cpu.is_swapped(rows, width, d_width)
    shape = (d_width, width) if self.swapped else (width, d_width)
    self.total = jnp.zeros((num_experts, *shape), jnp.float32)

  def add(
    self,
    block: Block,
    total: Float32[Array, 'E _ _'],
    x: Float[Array, 'R M'],
    dy: Float[Array, 'R F'],
  ) -> Float32[Array, 'E _ _']:
    """The total with the product of a block's rows x and dy added."""
    pair = (dy, x) if self.swapped else (x, dy)
    return block.add(total, cpu.product_over_rows(*pair))

  def result(self, total: Float32[Array, 'E _ _']) -> Float32[Array, 'E M F']:
    """The sums, from the total of all blocks."""
    return total.swapaxes(1, 2) if self.swapped else total


def block_sizes(num_rows: int, num_experts: int) -> list[int]:
  """The numbers of rows that an expert's first block can have, ascending.

  All other blocks have the last of these numbers, which is at most `num_rows`.
  """
  share = min(-(-num_rows // num_experts), _MOST_SHARE)
  sizes = {
    -(-share * part // (16 * _MULTIPLE)) * _MULTIPLE for part in SIXTEENTHS
  }
  return sorted({min(size, num_rows) for size in sizes})


def for_each_block(
  body: Callable[[Block, tuple[Array, ...], Any], Any],
  carry: Any,
  kernels: tuple[Array, ...],
  group_sizes: Int32[Array, ' E'],
  num_rows: int,
) -> Any:
  """Folds `body(block, the expert's kernels, carry)` over all blocks, in order.

  `body` returns the next carry, which is updated in place; the last one is
  returned. `kernels` are arrays [E, ...], of which `body` gets one expert's,
  [...]. Of N = `num_rows` rows, sorted by expert, each expert has as many as
  `group_sizes` says; experts without rows are skipped.
  """
  E, N = group_sizes.shape[0], num_rows
  sizes = block_sizes(N, E)
  full = sizes[-1]
  stops = jnp.cumsum(group_sizes)
  used_experts = jnp.flatnonzero(group_sizes > 0, size=E, fill_value=0)

  def serve_expert(i, carry):
    e = used_experts[i].astype(jnp.int32)
    n, begin = group_sizes[e], stops[e] - group_sizes[e]
    # With the barrier, all blocks of the expert read one slice of its kernels.
    # Without it, the compiler would slice the kernels anew in each block.
    slices = jax.lax.optimization_barrier(
      tuple(jax.lax.dynamic_index_in_dim(w, e, 0, False) for w in kernels)
    )
    num_full = (n - 1) // full
    first_rows = n - num_full * full
    # For each size there is a loop of one round or none, in place of a
    # conditional, as a loop carries its buffers without a copy. The computation
    # depends on the loop's counter, since the compiler would otherwise hoist it
    # out of the loop, and it would always be done.
    smaller = 0
    for size in sizes:
      fits = (first_rows <= size) & (first_rows > smaller)

      def first_block(j, carry, size=size):
        start = jnp.minimum(begin + j, N - size)
        stop = begin + first_rows
        return body(Block(e + j, start, begin, stop, size, True), slices, carry)

      carry = jax.lax.fori_loop(0, fits.astype(jnp.int32), first_block, carry)
      smaller = size

    def full_block(j, carry):
      start = begin + first_rows + j * full
      block = Block(e, start, start, start + full, full, False)
      return body(block, slices, carry)

    return jax.lax.fori_loop(0, num_full, full_block, carry)

  return jax.lax.fori_loop(0, (group_sizes > 0).sum(), serve_expert, carry)


def dot(
  x: Float[Array, '_ _'],
  w: Float[Array, '_ _'],
  contract: tuple[int, int],
  dtype=None,
) -> Float[Array, '_ _']:
  """The product of x and w, summed in float32 over one axis of each.

  `contract` is the pair of that axis of x and that axis of w. The type of the
  result is `dtype`, by default that of x.
  """
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  y = jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)
  return y.astype(dtype or x.dtype)


def matmul(
  x: Float[Array, 'N _'],
  w: Float[Array, 'E _ _'],
  group_sizes: Int32[Array, ' E'],
  transposed: bool,
) -> Float[Array, 'N _']:
  """x[n] @ w[e], or x[n] @ w[e].T if `transposed`, for each row n of group e.

  Rows are sorted by group, and group e has group_sizes[e] of them; those past
  the last group come out zero.
  """
  N = x.shape[0]

  def body(block, kernels, y):
    (kernel,) = kernels
    product = dot(block.rows(x), kernel, (1, 1 if transposed else 0))
    return block.write(y, product)

  y = jnp.zeros((N, w.shape[1 if transposed else 2]), x.dtype)
  return for_each_block(body, y, (w,), group_sizes, N)


def outer(
  x: Float[Array, 'N M'],
  dy: Float[Array, 'N F'],
  group_sizes: Int32[Array, ' E'],
) -> Float32[Array, 'E M F']:
  """The sum of x[n]^T dy[n] over the rows of each group, 0 if it has none.

  It is the gradient of kernels whose products with x have the gradient dy.
  """
  N, E = x.shape[0], group_sizes.shape[0]
  sums = KernelSums(N, E, x.shape[1], dy.shape[1])

  def body(block, _, total):
    # Both operands are masked, as rows past the last group may hold NaN, and
    # 0 * NaN is NaN.
    return sums.add(block, total, block.own_rows(x), block.own_rows(dy))

  return sums.result(for_each_block(body, sums.total, (), group_sizes, N))


def ffn(
  x: Float[Array, 'N M'],
  w_ins: tuple[Float[Array, 'E M F'], ...],
  w_out: Float[Array, 'E F M'],
  group_sizes: Int32[Array, ' E'],
  hidden: Callable[..., Array],
) -> tuple[Float[Array, 'N M'], tuple[Float[Array, 'N F'], ...]]:
  """hidden(x @ w_in, ...) @ w_out of E layers, and the products with `w_ins`.

  Each row of x, which are sorted by expert, is multiplied by its own expert's
  kernels; `hidden` is elementwise. Rows past the last group come out zero. All
  products of a block are computed before those of the next block, so that its
  rows stay in the cache.
  """
  N, F = x.shape[0], w_out.shape[1]

  def body(block, kernels, carry):
    *ins, out = kernels
    y, firsts = carry
    rows = block.rows(x)
    products = [dot(rows, w, (1, 0)) for w in ins]
    firsts = tuple(block.write(z, p) for z, p in zip(firsts, products))
    return block.write(y, dot(hidden(*products), out, (1, 0))), firsts

  firsts = tuple(jnp.zeros((N, F), x.dtype) for _ in w_ins)
  carry = (jnp.zeros_like(x), firsts)
  kernels = (*w_ins, w_out)
  return for_each_block(body, carry, kernels, group_sizes, N)


def ffn_gradients(
  x: Float[Array, 'N M'],
  w_ins: tuple[Float[Array, 'E M F'], ...],
  w_out: Float[Array, 'E F M'],
  group_sizes: Int32[Array, ' E'],
  firsts: tuple[Float[Array, 'N F'], ...],
  dy: Float[Array, 'N M'],
  hidden: Callable[..., Array],
) -> tuple:
  """The gradients of x, w_ins and w_out; those of kernels are float32.

  `firsts` are the products with `w_ins`, as `ffn` returned them, and dy is the
  gradient of its output; the other arguments are those that `ffn` had.

  An expert's first block may also have rows of other experts, whose hidden
  values are multiplied by zero: if one of these values is infinite, the
  gradient of the block's expert is NaN.
  """

  N, (E, F, M) = x.shape[0], w_out.shape
  in_sums, out_sums = KernelSums(N, E, M, F), KernelSums(N, E, F, M)

  def body(block, kernels, carry):
    *ins, out = kernels
    dx, dw_ins, dw_out = carry
    rows, d_rows = block.own_rows(x), block.own_rows(dy)
    h, pull = jax.vjp(hidden, *(block.rows(z) for z in firsts))
    # In the rows of other experts `d_firsts` is zero, as d_rows is: not NaN, as
    # the values that `ffn` wrote there to `firsts` are finite.
    d_firsts = pull(dot(d_rows, out, (1, 1)))
    d_rows_in = [dot(d, w, (1, 1)) for d, w in zip(d_firsts, ins)]
    dw_ins = tuple(
      in_sums.add(block, dw, rows, d) for dw, d in zip(dw_ins, d_firsts)
    )
    dw_out = out_sums.add(block, dw_out, h, d_rows)
    return block.write(dx, sum(d_rows_in)), dw_ins, dw_out

  carry = (jnp.zeros_like(x), (in_sums.total,) * len(w_ins), out_sums.total)
  kernels = (*w_ins, w_out)
  dx, dw_ins, dw_out = for_each_block(body, carry, kernels, group_sizes, N)
  return dx, tuple(map(in_sums.result, dw_ins)), out_sums.result(dw_out)
