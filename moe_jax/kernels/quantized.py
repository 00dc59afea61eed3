"""Kernels of few bits: the values that codes stand for, and codes in bytes.

A kernel is [*E, I, O], for I inputs and O output units. An output unit is a row
in papers on quantisation. Not here: how a grid is chosen for a kernel
(`compression/grids.py`), and codes of less than a bit (`ternary.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Float, Float32, Int8, Leaf, UInt8

# The widths in bits of the parts of a code. Codes of a part share bytes.
_PARTS = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
BITS = tuple(_PARTS)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['scale', 'zero'],
  meta_fields=['bits'],
)
@dataclasses.dataclass(frozen=True)
class UniformGrid:
  """Values at equal distances: scale * (code - zero).

  Attributes:
    scale: bfloat16 [*E, G, O], the distance of two values, for each of G groups
      of consecutive inputs of each output unit.
    zero: uint8 [*E, G, O], the code of the value 0.
    bits: The number of bits of a code.
  """

  scale: Leaf
  zero: Leaf
  bits: int

  def codes(self, w: Float[Array, '*E I O']) -> UInt8[Array, '*E I O']:
    """The code of the value nearest to each weight."""
    scale, zero = self._of_inputs(w.shape[-2])
    codes = jnp.round(w.astype(jnp.float32) / scale) + zero
    return jnp.clip(codes, 0, 2**self.bits - 1).astype(jnp.uint8)

  def values(self, codes: UInt8[Array, '*E I O']) -> Float32[Array, '*E I O']:
    """The values that codes stand for."""
    scale, zero = self._of_inputs(codes.shape[-2])
    return scale * (codes.astype(jnp.float32) - zero)

  def of_input(self, i: Leaf, inputs: int) -> 'UniformGrid':
    """The grid of input i alone, of as many as `inputs`, with G = 1."""
    group = i // group_len(inputs, self.scale.shape[-2])
    return jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, group, 1, -2), self
    )

  def _of_inputs(self, inputs):
    """Scale and zero of each input, float32 [*E, I or 1, O]."""
    grid = self.scale.astype(jnp.float32), self.zero.astype(jnp.float32)
    groups = self.scale.shape[-2]
    if groups == 1:
      return grid
    length = group_len(inputs, groups)
    return tuple(jnp.repeat(x, length, axis=-2)[..., :inputs, :] for x in grid)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['low', 'high'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TernaryGrid:
  """The values {low, 0, high} of each output unit, for codes -1, 0 and 1.

  It is the grid of QMoE (https://arxiv.org/abs/2310.16795).

  Attributes:
    low: bfloat16 [*E, 1, O], the lowest value, not above 0.
    high: bfloat16 [*E, 1, O], the highest value, not below 0.
  """

  low: Leaf
  high: Leaf

  def codes(self, w: Float[Array, '*E I O']) -> Int8[Array, '*E I O']:
    """The code of the value nearest to each weight; 0 where two are as near."""
    w = w.astype(jnp.float32)
    above = w > self.high.astype(jnp.float32) / 2
    below = w < self.low.astype(jnp.float32) / 2
    return above.astype(jnp.int8) - below.astype(jnp.int8)

  def values(self, codes: Int8[Array, '*E I O']) -> Float32[Array, '*E I O']:
    """The values that codes stand for."""
    low, high = self.low.astype(jnp.float32), self.high.astype(jnp.float32)
    return jnp.where(codes > 0, high, jnp.where(codes < 0, low, 0.0))

  def of_input(self, i: Leaf, inputs: int) -> 'TernaryGrid':
    """The grid of input i, which is that of all inputs."""
    del i, inputs
    return self


def num_groups(inputs: int, group_size: int) -> int:
  """The number of groups of so many inputs; 1 for a group size of 0."""
  return -(-inputs // group_size) if group_size else 1


def group_len(inputs: int, groups: int) -> int:
  """The number of inputs in a group; the last one may have fewer."""
  return -(-inputs // groups)


def packed_rows(inputs: int, bits: int) -> int:
  """The number of bytes in which the codes of I inputs of a unit are packed."""
  return sum(-(-inputs * width // 8) for width in _PARTS[bits])


def pack(codes: UInt8[Array, '*E I O'], bits: int) -> UInt8[Array, '*E P O']:
  """Codes of equal output units in bytes: 8 // width of them share one.

  Codes of 3 bits are packed in two parts, the low two bits and the high one.

  Args:
    codes: Codes below 2 ** bits.
    bits: The number of bits of a code, one of `BITS`.
  """
  packed_parts, shift = [], 0
  for width in _PARTS[bits]:
    part = codes >> shift & (1 << width) - 1
    per_byte = 8 // width
    padding = [(0, 0)] * (codes.ndim - 2) + [(0, -codes.shape[-2] % per_byte)]
    part = jnp.pad(part, [*padding, (0, 0)])
    *stack, inputs, units = part.shape
    part = part.reshape(*stack, inputs // per_byte, per_byte, units)
    # No two of the shifted codes have a bit in common.
    shifted = part << _shifts(width, part.ndim)
    packed_parts.append(shifted.sum(-2, dtype=jnp.uint8))
    shift += width
  return jnp.concatenate(packed_parts, axis=-2)


def unpack(
  packed: UInt8[Array, '*E P O'], bits: int, inputs: int
) -> UInt8[Array, '*E I O']:
  """The codes of `pack`.

  Args:
    packed: Bytes.
    bits: The number of bits of a code.
    inputs: I, the number of inputs.
  """
  codes, shift, first = jnp.zeros((), packed.dtype), 0, 0
  for width in _PARTS[bits]:
    per_byte = 8 // width
    rows = -(-inputs // per_byte)
    part = packed[..., first : first + rows, None, :]
    part = part >> _shifts(width, part.ndim) & (1 << width) - 1
    part = part.reshape(*packed.shape[:-2], rows * per_byte, packed.shape[-1])
    codes = codes + (part[..., :inputs, :] << shift)
    shift, first = shift + width, first + rows
  return codes


def _shifts(width: int, ndim: int) -> UInt8[Array, '...']:
  """The places in a byte of the codes that share it, along axis -2."""
  shifts = width * jnp.arange(8 // width, dtype=jnp.uint8)
  return shifts.reshape(*(1,) * (ndim - 2), -1, 1)
