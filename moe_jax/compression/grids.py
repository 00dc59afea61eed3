"""Grids of few values for kernels, and rounding to the nearest of them.

A kernel is [*E, I, O], for I inputs and O output units; a row of the papers is
one output unit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels.quantized import TernaryGrid, UniformGrid
from moe_jax.layers.kernel_format import BITS, TERNARY, KernelFormat
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float, Float32, Leaf

Grid = UniformGrid | TernaryGrid


class Rounded(NamedTuple):
  """A kernel on a grid.

  Attributes:
    codes: The code of each weight, uint8 or int8 [*E, I, O].
    grid: The grid of the codes.
  """

  codes: Leaf
  grid: Grid

  @property
  def values(self) -> Float32[Array, '*E I O']:
    """The weights after rounding."""
    return _values(self.codes, self.grid)


# Compiled as a whole, since one operation after another takes long.
_values = jax.jit(lambda codes, grid: grid.values(codes))


def uniform(w: Float[Array, '*E I O'], bits: int) -> UniformGrid:
  """The grid of 2 ** bits values between the least and the greatest weight.

  Each output unit has its own. One of the values is 0, and no weight is off by
  more than half the distance of two values. Distances are rounded up to a
  bfloat16.

  Args:
    w: The kernel.
    bits: The number of bits of a code.
  """
  w = w.astype(jnp.float32)
  low = jnp.minimum(w.min(-2, keepdims=True), 0.0)
  high = jnp.maximum(w.max(-2, keepdims=True), 0.0)
  scale = _rounded_up((high - low) / (2**bits - 1))
  scale = jnp.where(scale > 0, scale, jnp.bfloat16(1))
  zero = jnp.round(-low / scale.astype(jnp.float32))
  return UniformGrid(scale, zero.astype(jnp.uint8), bits)


def _rounded_up(x: Float32[Array, '*N']) -> Array:
  """The least bfloat16 that is not below x."""
  near = x.astype(jnp.bfloat16)
  above = jnp.nextafter(near, jnp.array(jnp.inf, jnp.bfloat16))
  return jnp.where(near.astype(jnp.float32) < x, above, near)


@checked
def ternary(w: Float[Array, '*E I O']) -> TernaryGrid:
  """The grid {min, 0, max} of the weights of each output unit (QMoE)."""
  w = w.astype(jnp.float32)
  low = jnp.minimum(w.min(-2, keepdims=True), 0.0)
  high = jnp.maximum(w.max(-2, keepdims=True), 0.0)
  return TernaryGrid(low.astype(jnp.bfloat16), high.astype(jnp.bfloat16))


def of_format(w: Float[Array, '*E I O'], format: KernelFormat) -> Grid:
  """The grid of a kernel in a format, from its weights alone."""
  return ternary(w) if format.name == TERNARY else uniform(w, BITS[format.name])


@checked
def nearest(w: Float[Array, '*E I O'], grid: Grid) -> Rounded:
  """Each weight rounded to the nearest value of a grid."""
  return Rounded(grid.codes(w), grid)
