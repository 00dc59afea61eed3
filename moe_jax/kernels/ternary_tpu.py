"""The product with a coded ternary matrix as one Pallas kernel for TPUs.

A TPU cannot look codes up in a table of 2^16 entries inside a kernel, and need
not: the dictionary is ordered, so that a code's weights follow from the code by
counting (`ternary_dictionary.unrank`), in vectors of 1024 codes. The rest of
the work is to find the position of each weight. Rows follow each other without
gaps, so that a block of rows is one run of positions; each position finds its
code by bisection among the ends of 128 codes, which one register holds.

On a CPU the same kernel is interpreted, slowly, for tests. It is compiled for
TPUs ahead of time by tests; its speed on one was never measured.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.errors import InputError
from moe_jax.kernels.ternary import Codes
from moe_jax.kernels.ternary_dictionary import WORD_WEIGHTS, unrank
from moe_jax.shapes import Array, Float, Int32

_LANES = 128
# The rows of codes that are decoded at a time: a whole tile of 16-bit numbers.
_CODE_ROWS = 16
_GROUP = _CODE_ROWS * _LANES
# The number of positions in a register of 8 rows.
_TILE = 8 * _LANES
# The number of output units whose weights are decoded before a product.
_ROWS = 128
# Bounds of a block of x, in rows and in bytes. Twice those bytes and the
# weights of the widest block stay below 16 MiB, which XLA allows a kernel.
_MOST_X_ROWS, _X_BYTES = 256, 2 << 20
_MOST_WIDTH = 1 << 14


def takes(width: int) -> bool:
  """Whether the kernel multiplies rows of that width: whole registers."""
  return width % _LANES == 0 and width <= _MOST_WIDTH


def matmul(
  x: Float[Array, 'N M'],
  codes: Codes,
  low: Float[Array, ' R'],
  high: Float[Array, ' R'],
  p0: float,
) -> Float[Array, 'N R']:
  """The product of `ternary_product.ternary_matmul`."""
  (N, M), R = x.shape, low.shape[0]
  if not takes(M):
    raise InputError(
      f'rows of width {M} must be a multiple of {_LANES} and at most '
      f'{_MOST_WIDTH} for the kernel'
    )
  blocks = pl.cdiv(R, _ROWS)
  fits = max(_X_BYTES // (M * x.dtype.itemsize) // 16, 1) * 16
  rows = min(fits, _MOST_X_ROWS, pl.cdiv(N, 16) * 16)
  # The kernel selects in 32 bits, the width of its masks.
  lows, highs = (v.astype(jnp.float32)[None] for v in (low, high))
  tiles = jnp.pad(codes.codes, (0, -codes.codes.shape[0] % _GROUP))
  tiles = tiles.reshape(-1, _LANES)
  starts = _starts(tiles, p0)
  # The group of codes in which each block of rows begins.
  edges = jnp.arange(blocks + 1, dtype=jnp.int32) * (_ROWS * M)
  groups = jnp.searchsorted(starts[::_CODE_ROWS], edges, side='right') - 1
  # Rows past N and R hold anything, and so does what is computed of them, which
  # is not written.
  return _call(
    functools.partial(_kernel, p0=p0, width=M),
    (blocks, pl.cdiv(N, rows)),
    rows,
    *(starts, groups.astype(jnp.int32), tiles, lows, highs, x),
  )


def _starts(tiles, p0) -> Int32[Array, ' C']:
  """The position at which each 128 codes begin, and the end of the last."""
  lengths = unrank(tiles.astype(jnp.int32), p0, jnp.where)[2].sum(1)
  return jnp.append(jnp.zeros(1, jnp.int32), jnp.cumsum(lengths))


def _call(kernel, grid, rows, starts, groups, tiles, low, high, x):
  """Calls the kernel, interpreted where the program is lowered for a CPU."""
  M, R = x.shape[1], low.shape[1]
  values = pl.BlockSpec((1, _ROWS), lambda r, n, *_: (0, r))
  grid_spec = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=2,
    grid=grid,
    in_specs=[
      pl.BlockSpec(memory_space=pl.ANY),
      values,
      values,
      pl.BlockSpec((rows, M), lambda r, n, *_: (n, 0)),
    ],
    out_specs=pl.BlockSpec((rows, _ROWS), lambda r, n, *_: (n, r)),
    scratch_shapes=[
      pltpu.VMEM((_CODE_ROWS, _LANES), tiles.dtype),
      *[pltpu.VMEM((_CODE_ROWS, _LANES), jnp.int32)] * 3,
      pltpu.VMEM((_ROWS * M // _LANES, _LANES), jnp.float32),
      pltpu.SemaphoreType.DMA,
    ],
  )

  def run(interpret):
    return pl.pallas_call(
      kernel,
      jax.ShapeDtypeStruct((x.shape[0], R), x.dtype),
      grid_spec=grid_spec,
      interpret=interpret,
    )

  args = starts, groups, tiles, low, high, x
  return jax.lax.platform_dependent(*args, cpu=run(True), default=run(False))


def _kernel(
  starts_ref,
  groups_ref,
  tiles_ref,
  low_ref,
  high_ref,
  x_ref,
  y_ref,
  codes_ref,
  *refs,
  p0,
  width,
):
  """One block of y; the weights are decoded at the first block of x."""
  *decoded_refs, weights_ref, copied = refs
  block = pl.program_id(0)

  @pl.when(pl.program_id(1) == 0)
  def _():
    def group(g, _):
      at = pl.multiple_of(g * _CODE_ROWS, _CODE_ROWS)
      copy = pltpu.make_async_copy(
        tiles_ref.at[pl.ds(at, _CODE_ROWS)], codes_ref, copied
      )
      copy.start()
      copy.wait()
      _unpack(codes_ref, *decoded_refs, p0=p0)
      first = block * (_ROWS * width)
      write_row = functools.partial(
        _write_weights, starts_ref, *decoded_refs, weights_ref, g, first
      )
      jax.lax.fori_loop(0, _CODE_ROWS, lambda row, _: write_row(row), None)

    last = jnp.minimum(
      groups_ref[block + 1] + 1, tiles_ref.shape[0] // _CODE_ROWS
    )
    jax.lax.fori_loop(groups_ref[block], last, group, None)

  _multiply(x_ref, low_ref, high_ref, weights_ref, y_ref, width)


def _unpack(codes_ref, last_ref, first_ref, ends_ref, p0):
  """Writes the two words of each code, and its end from its row's start."""
  last, first, length = unrank(codes_ref[...].astype(jnp.int32), p0, jnp.where)
  last_ref[...], first_ref[...] = last, first
  from_lane = jax.lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 0)
  to_lane = jax.lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 1)
  before = (from_lane <= to_lane).astype(jnp.float32)
  # The sums are exact: lengths are at most 28, of 5 bits.
  ends = jnp.dot(length.astype(jnp.float32), before)
  ends_ref[...] = ends.astype(jnp.int32)


def _write_weights(
  starts_ref, last_ref, first_ref, ends_ref, weights_ref, group, first, row
):
  """Writes the weights of 128 codes at their positions in the block."""
  start = starts_ref[group * _CODE_ROWS + row] - first
  stop = starts_ref[group * _CODE_ROWS + row + 1] - first
  size = weights_ref.shape[0] * _LANES

  def row_of(ref):
    return jnp.broadcast_to(ref[pl.ds(row, 1), :], (8, _LANES))

  words, ends = (row_of(last_ref), row_of(first_ref)), row_of(ends_ref)
  ends = ends + start

  def tile(t, _):
    at = pl.ds(pl.multiple_of(t * 8, 8), 8)
    position = (
      t * _TILE
      + _LANES * jax.lax.broadcasted_iota(jnp.int32, (8, _LANES), 0)
      + jax.lax.broadcasted_iota(jnp.int32, (8, _LANES), 1)
    )
    inside = (position >= start) & (position < stop)
    weights = _weights_at(position, words, ends)
    weights_ref[at, :] = jnp.where(inside, weights, weights_ref[at, :])

  from_tile = jax.lax.div(jnp.maximum(start, 0), _TILE)
  to_tile = jax.lax.div(jnp.clip(stop, 0, size) + _TILE - 1, _TILE)
  jax.lax.fori_loop(from_tile, to_tile, tile, None)


def _weights_at(position, words, ends):
  """The weight at each position, of codes that end before `ends`."""

  def take(values, lane):
    return jnp.take_along_axis(values, lane, 1, mode='promise_in_bounds')

  # Bisection counts the codes that end at or before the position.
  code = jnp.zeros_like(position)
  step = _LANES // 2
  while step:
    ended = take(ends, code + (step - 1)) <= position
    code = jnp.where(ended, code + step, code)
    step //= 2
  after = take(ends, code) - 1 - position
  last, first = (take(word, code) for word in words)
  in_last = after < WORD_WEIGHTS
  word = jnp.where(in_last, last, first)
  # Positions of other codes are not written; their shift must be valid.
  offset = jnp.clip(jnp.where(in_last, after, after - WORD_WEIGHTS), 0, 15)
  bits = jax.lax.shift_right_logical(word, 2 * offset)
  return ((bits & 1) - (bits & 2)).astype(jnp.float32)


def _multiply(x_ref, low_ref, high_ref, weights_ref, y_ref, width):
  """y = x @ w.T, 128 columns of both at a time."""
  tiles = width // _LANES
  # The value of each row of w, in all columns.
  low, high = (
    jnp.broadcast_to(ref[...], (_LANES, _ROWS)).T for ref in (low_ref, high_ref)
  )

  def add(t, y):
    ternary = weights_ref[pl.ds(t, _ROWS, stride=tiles), :]
    cols = pl.ds(pl.multiple_of(t * _LANES, _LANES), _LANES)
    w = jnp.where(ternary > 0, high, jnp.where(ternary < 0, low, 0.0))
    return y + jax.lax.dot_general(
      x_ref[:, cols],
      w.astype(x_ref.dtype),
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )

  y = jnp.zeros(y_ref.shape, jnp.float32)
  y_ref[...] = jax.lax.fori_loop(0, tiles, add, y).astype(y_ref.dtype)
