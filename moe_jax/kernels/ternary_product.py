"""The product of rows and a coded ternary matrix, decoded where it is used.

TPUs have a kernel (`ternary_tpu.py`); elsewhere, and there for widths that the
kernel does not take, blocks of rows are decoded by the table and multiplied.
The product has no gradient.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.kernels import ternary, ternary_tpu
from moe_jax.kernels.backends import AUTO
from moe_jax.kernels.ternary import Codes
from moe_jax.kernels.ternary_dictionary import P0, dictionary
from moe_jax.options import unknown
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float

# The plain backend decodes at most about this number of weights at a time, and
# looks up this number of codes.
BLOCK_WEIGHTS, CHUNK = 1 << 20, 4096


@checked
def ternary_matmul(
  x: Float[Array, 'N M'],
  codes: Codes,
  low: Float[Array, ' R'],
  high: Float[Array, ' R'],
  p0: float = P0,
  backend: str = AUTO,
) -> Float[Array, 'N R']:
  """x @ w.T in the type of x, where row r of w has 0, low[r] and high[r].

  Args:
    x: The rows.
    codes: The ternary matrix [R, M], of one expert (`vmap` for more).
    low: The value of the weights -1 of each row.
    high: The value of the weights 1 of each row.
    p0: The probability of a zero of which the dictionary was made.
    backend: One of `BACKENDS`, or 'auto', the one of the platform.

  Raises:
    ValueError: Shapes do not fit, the backend is unknown, or it does not take
      the width.
  """
  if backend != AUTO and backend not in BACKENDS:
    raise unknown('ternary_matmul backend', backend, [AUTO, *BACKENDS])
  if codes.offsets.shape != (low.shape[0] + 1,):
    raise InputError(
      f'offsets {list(codes.offsets.shape)} must be [R + 1], where low and '
      f'high have R={low.shape[0]}'
    )
  args = x, codes, low, high
  if backend != AUTO:
    return BACKENDS[backend](*args, p0)
  if not ternary_tpu.takes(x.shape[1]):
    return plain(*args, p0)
  return jax.lax.platform_dependent(
    *args,
    tpu=functools.partial(ternary_tpu.matmul, p0=p0),
    default=functools.partial(plain, p0=p0),
  )


def plain(
  x: Float[Array, 'N M'],
  codes: Codes,
  low: Float[Array, ' R'],
  high: Float[Array, ' R'],
  p0: float,
) -> Float[Array, 'N R']:
  """The product of `ternary_matmul`, one block of output units at a time."""
  (N, M), R = x.shape, low.shape[0]
  rows = min(max(BLOCK_WEIGHTS // M, 1), R)
  blocks = -(-R // rows)
  padding = blocks * rows - R
  edges = jnp.pad(codes.offsets, (0, padding), mode='edge')[::rows]
  values = [
    jnp.pad(v.astype(x.dtype), (0, padding)).reshape(blocks, rows, 1)
    for v in (low, high)
  ]

  def product(block):
    start, stop, low, high = block
    w = _decoded(codes.codes, start, stop, rows, M, p0)
    return x @ jnp.where(w > 0, high, jnp.where(w < 0, low, 0)).T

  y = jax.lax.map(product, (edges[:-1], edges[1:], *values))
  return y.swapaxes(0, 1).reshape(N, -1)[:, :R]


def _decoded(codes, start, stop, rows, width, p0):
  """The rows whose codes are start, ..., stop - 1, decoded in chunks."""
  padded = width + width % 2
  chunk = min(CHUNK, codes.shape[0])

  def add(i, decoded):
    end, weights = decoded
    index = start + i * chunk + jnp.arange(chunk)
    chunk_codes = jnp.take(codes, index, mode='clip')
    lengths = jnp.asarray(dictionary(p0).lengths)[chunk_codes]
    ends = end + jnp.cumsum(jnp.where(index < stop, lengths, 0))
    # Codes of other blocks are placed past the end, where they are lost.
    ends_inside = jnp.where(index < stop, ends, weights.size + 1)
    weights = ternary.place_codes(chunk_codes, ends_inside, weights, p0)
    return ends[-1], weights

  weights = jnp.zeros(ternary.MOST_WEIGHTS + rows * padded, jnp.int8)
  chunks = -(-(stop - start) // chunk)
  _, weights = jax.lax.fori_loop(0, chunks, add, (jnp.int32(0), weights))
  return weights[ternary.MOST_WEIGHTS :].reshape(rows, padded)[:, :width]


BACKENDS = {
  'plain': plain,  # any platform
  'pallas_tpu': ternary_tpu.matmul,  # TPUs
}
