"""Products of rows grouped by expert, by JAX's TPU kernels named megablox.

They are Pallas kernels that follow MegaBlocks
(https://arxiv.org/abs/2211.15841). On a CPU they are interpreted, which is
correct but slow.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from moe_jax.shapes import Array, Float, Float32, Int32

# A TPU's lanes, of which a tile's width is a multiple.
_LANES = 128
_LEAST_ROWS, _MOST_ROWS = 128, 512
# The width of the widest tile, in bytes of a row. With such tiles, all that a
# kernel holds (each tile twice, as the next is fetched ahead, and float32 sums)
# stays below 16 MiB, which XLA allows a kernel. The outer product sums over
# rows: its sums are as wide as both tiles, which must therefore be narrower.
_MATMUL_BYTES, _OUTER_BYTES = 2048, 1024


def tiling(
  num_rows: int, num_experts: int, widths: tuple[int, int], most: int
) -> tuple[int, int, int]:
  """The number of rows and the two widths of a tile that a kernel multiplies.

  Arrays are padded to multiples of the tile. The number of rows is a power of
  two, within bounds, near an expert's equal share, since all rows of a tile are
  multiplied for each expert that has a row in it. Each width is the widest that
  divides the array's width rounded up to whole lanes. It must divide that
  width, since the kernels are silently wrong where a contraction ends within a
  tile, and padding an array further would copy the kernels of all experts.

  Args:
    num_rows: The number N of rows.
    num_experts: The number E of experts.
    widths: The widths M and F, in the order of the result.
    most: The largest width that a tile may have.
  """
  share = max(num_rows // num_experts, 1)
  rows = min(max(1 << (share.bit_length() - 1), _LEAST_ROWS), _MOST_ROWS)
  M, F = (_width(-(-width // _LANES), most) for width in widths)
  return rows, M, F


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
  (N, M), E = x.shape, w.shape[0]
  F = w.shape[1 if transposed else 2]
  tiles = tiling(N, E, (M, F), _MATMUL_BYTES // x.dtype.itemsize)
  rows, tile_m, tile_f = tiles
  kernel_tile = (tile_f, tile_m) if transposed else (tile_m, tile_f)
  y = _by_platform(
    functools.partial(
      gmm,
      preferred_element_type=x.dtype,
      tiling=tiles,
      transpose_rhs=transposed,
    ),
    _padded(x, (rows, tile_m)),
    _padded(w, (1, *kernel_tile)),
    group_sizes,
  )
  # The kernel does not write the rows that belong to no group.
  row = jnp.arange(N, dtype=jnp.int32)
  return jnp.where((row < group_sizes.sum())[:, None], y[:N, :F], 0)


def outer(
  x: Float[Array, 'N M'],
  dy: Float[Array, 'N F'],
  group_sizes: Int32[Array, ' E'],
) -> Float32[Array, 'E M F']:
  """The sum of x[n]^T dy[n] over the rows of each group, 0 if it has none.

  It is the gradient of kernels whose products with x have the gradient dy.
  """
  (N, M), F, E = x.shape, dy.shape[1], group_sizes.shape[0]
  tiles = tiling(N, E, (M, F), _OUTER_BYTES // x.dtype.itemsize)
  rows, tile_m, tile_f = tiles
  # The kernel selects a group's rows in both its tiles, so that no value of
  # other groups, NaN included, is multiplied.
  dw = _by_platform(
    functools.partial(tgmm, preferred_element_type=jnp.float32, tiling=tiles),
    _padded(x, (rows, tile_m)).T,
    _padded(dy, (rows, tile_f)),
    group_sizes,
  )
  return dw[:, :M, :F]


def _width(lanes: int, most: int) -> int:
  """The largest multiple of 128, up to `most`, that divides 128 * lanes."""
  tile_lanes = range(1, most // _LANES + 1)
  return _LANES * max(n for n in tile_lanes if lanes % n == 0)


def _padded(x: Array, tile: tuple[int, ...]) -> Array:
  """x, with zeros behind each axis up to a multiple (at least 1) of `tile`."""
  padded_sizes = [max(-(-size // t), 1) * t for size, t in zip(x.shape, tile)]
  missing = [n - size for n, size in zip(padded_sizes, x.shape)]
  return jnp.pad(x, [(0, n) for n in missing]) if any(missing) else x


def _by_platform(kernel, *args) -> Array:
  """The result of kernel(*args), which is interpreted on a CPU.

  The platform is known when the program is lowered: a program for a TPU may be
  compiled without a TPU.
  """
  return jax.lax.platform_dependent(
    *args, cpu=functools.partial(kernel, interpret=True), default=kernel
  )
