"""Grids of few values for kernels, and rounding to the nearest of them.

A kernel is [*E, I, O], for I inputs and O output units; a row of the papers is
one output unit. Not here: rounding that minds the inputs (`gptq.py`), and the
values that codes stand for (`kernels/quantized.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels.quantized import TernaryGrid, UniformGrid, group_len
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


def uniform(
  w: Float[Array, '*E I O'],
  bits: int,
  groups: int = 1,
  symmetric: bool = False,
) -> UniformGrid:
  """The grid of 2 ** bits values between the least and the greatest weight.

  One of the values is 0, and no weight is off by more than half the distance of
  two values. Distances are rounded up to a bfloat16.

  Args:
    w: The kernel.
    bits: The number of bits of a code.
    groups: The number of groups, as even as can be, into which the inputs of
      each output unit are divided; each has a grid of its own.
    symmetric: Whether the grid reaches as far below 0 as above, but for one
      value; its zero is then always the code 2 ** (bits - 1).
  """
  w = w.astype(jnp.float32)
  *stack, inputs, units = w.shape
  length = group_len(inputs, groups)
  padding = [(0, 0)] * len(stack) + [(0, groups * length - inputs), (0, 0)]
  by_group = jnp.pad(w, padding).reshape(*stack, groups, length, units)
  low = jnp.minimum(by_group.min(-2), 0.0)
  high = jnp.maximum(by_group.max(-2), 0.0)
  if symmetric:
    high = jnp.maximum(high, -low)
    low = -high
  scale = _rounded_up((high - low) / (2**bits - 1))
  scale = jnp.where(scale > 0, scale, jnp.bfloat16(1))
  if symmetric:
    zero = jnp.full(low.shape, 2.0 ** (bits - 1))
  else:
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


@checked
def nearest(w: Float[Array, '*E I O'], grid: Grid) -> Rounded:
  """Each weight rounded to the nearest value of a grid."""
  return Rounded(grid.codes(w), grid)
