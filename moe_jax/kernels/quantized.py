"""Kernels of few bits: the values that codes stand for, and codes in bytes.

A kernel is [*E, I, O], for I inputs and O output units. An output unit is a row
in papers on quantisation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Float, Float32, Int8, Leaf, UInt8

# The bits of a code; 8 // bits of them share a byte.
BITS = (8, 4, 2)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['scale', 'zero'],
  meta_fields=['bits'],
)
@dataclasses.dataclass(frozen=True)
class UniformGrid:
  """Values at equal distances: scale * (code - zero).

  Attributes:
    scale: bfloat16 [*E, 1, O], the distance of two values of each output unit.
    zero: uint8 [*E, 1, O], the code of the value 0.
    bits: The number of bits of a code.
  """

  scale: Leaf
  zero: Leaf
  bits: int

  def codes(self, w: Float[Array, '*E I O']) -> UInt8[Array, '*E I O']:
    """The code of the value nearest to each weight."""
    scale, zero = self.scale.astype(jnp.float32), self.zero.astype(jnp.float32)
    codes = jnp.round(w.astype(jnp.float32) / scale) + zero
    return jnp.clip(codes, 0, 2**self.bits - 1).astype(jnp.uint8)

  def values(self, codes: UInt8[Array, '*E I O']) -> Float32[Array, '*E I O']:
    """The values that codes stand for."""
    zero = self.zero.astype(jnp.float32)
    return self.scale.astype(jnp.float32) * (codes.astype(jnp.float32) - zero)


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


def packed_rows(inputs: int, bits: int) -> int:
  """The number of bytes in which the codes of I inputs of a unit are packed."""
  return -(-inputs * bits // 8)


def pack(codes: UInt8[Array, '*E I O'], bits: int) -> UInt8[Array, '*E P O']:
  """Codes of equal output units in bytes: 8 // bits of them share one.

  Args:
    codes: Codes below 2 ** bits.
    bits: The number of bits of a code, one of `BITS`.
  """
  per_byte = 8 // bits
  padding = [(0, 0)] * (codes.ndim - 2) + [(0, -codes.shape[-2] % per_byte)]
  codes = jnp.pad(codes, [*padding, (0, 0)])
  *stack, inputs, units = codes.shape
  codes = codes.reshape(*stack, inputs // per_byte, per_byte, units)
  # No two of the shifted codes have a bit in common.
  return (codes << _shifts(bits, codes.ndim)).sum(-2, dtype=jnp.uint8)


def unpack(
  packed: UInt8[Array, '*E P O'], bits: int, inputs: int
) -> UInt8[Array, '*E I O']:
  """The codes of `pack`, for I inputs."""
  *stack, rows, units = packed.shape
  codes = packed[..., None, :]
  codes = codes >> _shifts(bits, codes.ndim) & (1 << bits) - 1
  codes = codes.reshape(*stack, rows * (8 // bits), units)
  return codes[..., :inputs, :]


def _shifts(bits: int, ndim: int) -> UInt8[Array, '...']:
  """The places in a byte of the codes that share it, along axis -2."""
  shifts = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
  return shifts.reshape(*(1,) * (ndim - 2), -1, 1)
