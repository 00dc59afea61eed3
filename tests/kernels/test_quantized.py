"""Codes in bytes, and what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import quantized
from moe_jax.kernels.quantized import TernaryGrid, UniformGrid


def test_codes_of_two_bits_share_bytes():
  # One output unit of five inputs: the first four are the first byte.
  codes = jnp.array([3, 0, 1, 2, 1], jnp.uint8)[:, None]
  packed = quantized.pack(codes, 2)
  assert packed.tolist() == [[0b10_01_00_11], [0b01]]


@pytest.mark.parametrize(
  ('bits', 'inputs'), [*((bits, 7) for bits in quantized.BITS), (4, 16), (2, 1)]
)
def test_packed_codes_come_back(bits, inputs):
  @jax.jit
  def round_trip(codes):
    packed = quantized.pack(codes, bits)
    return packed, quantized.unpack(packed, bits, inputs)

  shape = (2, inputs, 3)
  codes = np.random.default_rng(bits).integers(0, 2**bits, shape, np.uint8)
  packed, unpacked = round_trip(codes)
  assert packed.shape == (2, quantized.packed_rows(inputs, bits), 3)
  np.testing.assert_array_equal(unpacked, codes)


def test_bits_are_used_in_full():
  assert [quantized.packed_rows(64, b) for b in (8, 4, 2)] == [64, 32, 16]


def test_values_of_a_uniform_grid():
  grid = UniformGrid(
    jnp.full((1, 1), 0.5, jnp.bfloat16), jnp.full((1, 1), 1, jnp.uint8), 2
  )
  codes = jnp.array([0, 3, 1], jnp.uint8)[:, None]
  assert grid.values(codes).ravel().tolist() == [-0.5, 1.0, 0.0]
  w = jnp.array([-9.0, 0.3, 3.1])[:, None]
  assert grid.codes(w).ravel().tolist() == [0, 2, 3]


def test_values_of_a_ternary_grid():
  # Halves of the ends decide, and a weight in the middle becomes 0.
  grid = TernaryGrid(*(jnp.full((1, 1), v, jnp.bfloat16) for v in (-1.0, 2.0)))
  w = jnp.array([-0.6, -0.5, 0.9, 1.0, 1.1])[:, None]
  codes = grid.codes(w)
  assert codes.ravel().tolist() == [-1, 0, 0, 0, 1]
  assert grid.values(codes).ravel().tolist() == [-1.0, 0.0, 0.0, 0.0, 2.0]
