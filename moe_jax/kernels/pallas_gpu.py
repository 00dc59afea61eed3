"""Products of rows grouped by expert, in two Triton kernels for NVIDIA GPUs.

The rows of an expert are not padded. A block of rows belongs to one expert, and
what it reads and writes is masked by that expert's rows; blocks that an uneven
load leaves unused end at once. Both kernels go over tiles of the result in
bands of neighbours, so that programs that run at the same time share operands
in the cache.

On a CPU the same kernels are interpreted, slowly, for tests.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_jax.shapes import Array, Float, Float32, Int32

# The number of adjacent tiles that share an operand in the cache.
_BAND = 8


class Tiles(NamedTuple):
  """The size of the tile that one program computes.

  Attributes:
    rows: The number of rows of the result.
    contract: The length of the contracted dimension that is summed at a time.
    cols: The number of columns of the result.
  """

  rows: int
  contract: int
  cols: int

  @property
  def params(self) -> plgpu.CompilerParams:
    """The compiler's parameters: eight warps for a full tile, else four."""
    full = self.rows * self.cols >= 128 * 128
    return plgpu.CompilerParams(num_warps=8 if full else 4, num_stages=3)


def tiles(rows: int, contract: int, cols: int, dtype) -> Tiles:
  """Tile sizes for a [rows, contract] by [contract, cols] product of `dtype`.

  A tile is at most 128 x 128, and 128 bytes along the contracted dimension of
  each operand are loaded at a time: three stages of such loads take 96 KiB of
  shared memory, which every GPU since Ampere has. All sizes are powers of two
  and at least 16, the least that a tensor core takes.
  """

  def fit(size, most):
    return min(max(pl.next_power_of_2(max(size, 1)), 16), most)

  widest = 128 // jnp.dtype(dtype).itemsize
  return Tiles(fit(rows, 128), fit(contract, widest), fit(cols, 128))


@functools.partial(jax.jit, static_argnames='transposed')
def matmul(
  x: Float[Array, 'N M'],
  w: Float[Array, 'E _ _'],
  group_sizes: Int32[Array, ' E'],
  transposed: bool,
) -> Float[Array, 'N F']:
  """x[n] @ w[e], or x[n] @ w[e].T if `transposed`, for each row n of group e.

  Rows are sorted by group, and group e has group_sizes[e] of them; those past
  the last group come out zero.

  float32 operands are multiplied as `jax.default_matmul_precision` says: as
  TF32 by default, like every other product on these GPUs.
  """
  (N, M), E = x.shape, w.shape[0]
  F = w.shape[1 if transposed else 2]
  size = tiles(pl.cdiv(N, E), M, F, x.dtype)
  # The number of blocks has a static bound: besides full blocks there are the
  # last block of each expert, and that of the rows of no expert, which may be
  # filled in part.
  bands = pl.cdiv(pl.cdiv(N, size.rows) + E, _BAND)
  blocks = row_blocks(group_sizes, N, size.rows, bands * _BAND)
  return _call(
    functools.partial(_matmul_kernel, size=size, transposed=transposed),
    (_BAND, pl.cdiv(F, size.cols), bands),
    jax.ShapeDtypeStruct((N, F), x.dtype),
    size,
    *(*blocks, x, w),
  )


@jax.jit
def outer(
  x: Float[Array, 'N M'],
  dy: Float[Array, 'N F'],
  group_sizes: Int32[Array, ' E'],
) -> Float32[Array, 'E M F']:
  """The sum of x[n]^T dy[n] over the rows of each group, 0 if it has none.

  It is the gradient of kernels whose products with x have the gradient dy.
  Float32 operands are multiplied as `jax.default_matmul_precision` says: as
  TF32 by default.
  """
  (N, M), F, E = x.shape, dy.shape[1], group_sizes.shape[0]
  size = tiles(M, pl.cdiv(N, E), F, x.dtype)
  num_tiles = pl.cdiv(M, size.rows)
  band = math.gcd(num_tiles, _BAND)
  start, stop = _bounds(group_sizes, N)
  return _call(
    functools.partial(_outer_kernel, size=size, band=band),
    (band, pl.cdiv(F, size.cols), num_tiles // band, E),
    jax.ShapeDtypeStruct((E, M, F), jnp.float32),
    size,
    *(start, stop, x, dy),
  )


def _call(kernel, grid, out_shape, size, *args):
  """Calls the kernel, interpreted where the program is lowered for a CPU.

  Programs run in the order of the grid, its first axis fastest.
  The kernel gets the refs of all `args` and of the result, and the compiler the
  parameters of the `Tiles` `size`. If one of `args` is empty, zeros return.
  """
  if not all(arg.size for arg in args):  # a grid must not be empty
    return jnp.zeros(out_shape.shape, out_shape.dtype)

  def run(interpret):
    return pl.pallas_call(
      kernel,
      out_shape,
      grid=grid,
      compiler_params=size.params,
      interpret=interpret,
    )

  return jax.lax.platform_dependent(*args, cpu=run(True), default=run(False))


def _bounds(group_sizes, num_rows) -> tuple[Array, Array]:
  """Each group's first row and the row behind its last, at most N: [E] each."""
  # Sizes that sum to more than N must not make a kernel write past the end.
  stop = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), num_rows)
  return jnp.append(jnp.zeros(1, jnp.int32), stop[:-1]), stop


def row_blocks(
  group_sizes: Int32[Array, ' E'],
  num_rows: int,
  block_rows: int,
  num_blocks: int,
) -> tuple[Int32[Array, ' B'], Int32[Array, ' B'], Int32[Array, ' B']]:
  """Each block's expert, its first row, and the row behind its expert's last.

  B = `num_blocks` blocks of `block_rows` rows go over N = `num_rows` rows that
  are sorted by expert. The last block of an expert may be filled in part.
  Rows of no expert count as rows of expert E. Blocks that are not needed count
  as blocks of expert E, too, and begin at or behind its last row. Rows past N
  are in no block, whatever the sizes sum to.
  """
  E = group_sizes.shape[0]
  start, stop = _bounds(group_sizes, num_rows)
  start = jnp.append(start, stop[-1])
  stop = jnp.append(stop, jnp.int32(num_rows))
  blocks = pl.cdiv(stop - start, block_rows)
  last = jnp.cumsum(blocks, dtype=jnp.int32)
  block = jnp.arange(num_blocks, dtype=jnp.int32)
  e = jnp.searchsorted(last, block, side='right', method='compare_all')
  e = jnp.minimum(e, E).astype(jnp.int32)
  first = start[e] + (block - (last - blocks)[e]) * block_rows
  return e, first, stop[e]


def _matmul_kernel(
  expert_ref, first_ref, stop_ref, x_ref, w_ref, y_ref, *, size, transposed
):
  """Computes a tile of y [N, F], the product of a block of rows of one expert.

  Rows of no expert are not read, and their outputs are zeros.

  Args:
    expert_ref: The expert of each block, as `row_blocks` returns it; E for rows
      of no expert.
    first_ref: The first row of each block.
    stop_ref: The row behind the last one of each block's expert.
    x_ref: The rows, [N, M].
    w_ref: The kernels, [E, M, F], or [E, F, M] if `transposed`.
    y_ref: The result, whole; a program writes its own tile.
    size: The `Tiles` of the product.
    transposed: Whether kernels are multiplied transposed.
  """
  (E, M), F = (w_ref.shape[0], x_ref.shape[1]), y_ref.shape[1]
  block = pl.program_id(2) * _BAND + pl.program_id(0)
  e, first, stop = expert_ref[block], first_ref[block], stop_ref[block]
  rows, cols = pl.ds(first, size.rows), _tile(pl.program_id(1), size.cols)
  row_mask = _below(first, size.rows, stop, 0)

  def body(step, y):
    at = _tile(step, size.contract)
    x_mask = row_mask, _edge(at, M, 1)
    w_mask = _edge(at, M, int(transposed)), _edge(cols, F, int(not transposed))
    w_at = (e, cols, at) if transposed else (e, at, cols)
    x = _load(x_ref.at[rows, at], *x_mask)
    w = _load(w_ref.at[w_at], *w_mask)
    return y + _dot(x, w, trans_b=transposed)

  steps = pl.cdiv(M, size.contract) * (e < E).astype(jnp.int32)
  y = jnp.zeros((size.rows, size.cols), jnp.float32)
  y = jax.lax.fori_loop(0, steps, body, y).astype(y_ref.dtype)
  mask = _all(row_mask, _edge(cols, F, 1))
  plgpu.store(y_ref.at[rows, cols], y, mask=mask)


def _outer_kernel(start_ref, stop_ref, x_ref, dy_ref, dw_ref, *, size, band):
  """Computes a tile of dw[e], the sum of x[n]^T dy[n] over the rows of group e.

  Args:
    start_ref: The first row of each group, [E].
    stop_ref: The row behind the last one of each group, [E].
    x_ref: The rows, [N, M].
    dy_ref: The gradients of their products, [N, F].
    dw_ref: The result, [E, M, F]; a program writes its own tile.
    size: The `Tiles` of the product.
    band: The number of tiles along M that the grid's first axis counts.
  """
  M, F = dw_ref.shape[1:]
  m = _tile(pl.program_id(2) * band + pl.program_id(0), size.rows)
  f, e = _tile(pl.program_id(1), size.cols), pl.program_id(3)
  start, stop = start_ref[e], stop_ref[e]

  def body(step, dw):
    first = start + step * size.contract
    rows = pl.ds(first, size.contract)
    # Both operands are masked: zero times a NaN of a neighbour's row is NaN.
    row_mask = _below(first, size.contract, stop, 0)
    x = _load(x_ref.at[rows, m], row_mask, _edge(m, M, 1))
    dy = _load(dy_ref.at[rows, f], row_mask, _edge(f, F, 1))
    return dw + _dot(x, dy, trans_a=True)

  steps = jax.lax.div(stop - start + size.contract - 1, size.contract)
  dw = jnp.zeros((size.rows, size.cols), jnp.float32)
  dw = jax.lax.fori_loop(0, steps, body, dw)
  mask = _all(_edge(m, M, 0), _edge(f, F, 1))
  plgpu.store(dw_ref.at[e, m, f], dw, mask=mask)


def _tile(index, size) -> slice | pl.Slice:
  return pl.ds(index * size, size)


def _below(first, size, stop, axis):
  """The mask of `size` indices from `first` on: True for those below `stop`.

  It is [size, 1] for the axis 0 of a tile, and [1, size] for the axis 1.
  """
  index = first + jnp.arange(size, dtype=jnp.int32)
  return jnp.expand_dims(index < stop, 1 - axis)


def _edge(tile, limit, axis):
  """The mask of a slice's n indices, True below `limit`; [n, 1] or [1, n].

  It is along `axis`, 0 or 1, and None if n divides `limit`: no tile crosses it.
  """
  if limit % tile.size == 0:
    return None
  return _below(tile.start, tile.size, limit, axis)


def _all(*masks):
  masks = [mask for mask in masks if mask is not None]
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref, *masks):
  """Loads a tile, zero where a mask is False; memory there is never read.

  A mask that is None is True everywhere.
  """
  mask = _all(*masks)
  return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _dot(a, b, **transposed):
  dtype = jnp.promote_types(a.dtype, b.dtype)
  return plgpu.dot(a.astype(dtype), b.astype(dtype), **transposed)
