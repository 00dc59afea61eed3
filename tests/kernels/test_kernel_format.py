"""Kernels in codes: grids, rounding to them, and codes in bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import kernel_format
from moe_jax.kernels.kernel_format import BITS, KernelFormat
from tests import reference

E, I, O = 2, 9, 5
W = np.random.default_rng(0).normal(size=(E, I, O)).astype(np.float32)


def test_codes_of_two_bits_share_bytes():
  # One output unit of five inputs: the first four are the first byte.
  codes = jnp.array([3, 0, 1, 2, 1], jnp.uint8)[:, None]
  packed = kernel_format.pack(codes, 2)
  assert packed.tolist() == [[0b10_01_00_11], [0b01]]


@pytest.mark.parametrize(
  ('bits', 'inputs'), [(8, 7), (4, 7), (2, 7), (4, 16), (2, 1)]
)
def test_packed_codes_come_back(bits, inputs):
  @jax.jit
  def round_trip(codes):
    packed = kernel_format.pack(codes, bits)
    return packed, kernel_format.unpack(packed, bits, inputs)

  shape = (2, inputs, 3)
  codes = np.random.default_rng(bits).integers(0, 2**bits, shape, np.uint8)
  packed, unpacked = round_trip(codes)
  assert packed.shape == (2, -(-inputs * bits // 8), 3)
  np.testing.assert_array_equal(unpacked, codes)


def rounded(w, name):
  """The grid, the codes and the values of weights in a format."""
  format = KernelFormat(name)
  grid = format.grid(w)
  codes = format.codes(w, grid)
  return grid, codes, format.values(codes, grid)


def test_values_of_a_uniform_grid():
  format = KernelFormat('int2')
  scale, zero = jnp.full((1, 1), 0.5, jnp.bfloat16), jnp.ones((1, 1), jnp.uint8)
  grid = {'scale': scale, 'zero': zero}
  codes = jnp.array([0, 3, 1], jnp.uint8)[:, None]
  assert format.values(codes, grid).ravel().tolist() == [-0.5, 1.0, 0.0]
  w = jnp.array([-9.0, 0.3, 3.1])[:, None]
  assert format.codes(w, grid).ravel().tolist() == [0, 2, 3]


def test_values_of_a_ternary_grid():
  # Halves of the ends decide, and a weight in the middle becomes 0.
  format = KernelFormat('ternary')
  low, high = (jnp.full((1, 1), v, jnp.bfloat16) for v in (-1.0, 2.0))
  grid = {'low': low, 'high': high}
  w = jnp.array([-0.6, -0.5, 0.9, 1.0, 1.1])[:, None]
  codes = format.codes(w, grid)
  assert codes.ravel().tolist() == [-1, 0, 0, 0, 1]
  values = format.values(codes, grid)
  assert values.ravel().tolist() == [-1.0, 0.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize('name', BITS)
def test_no_weight_is_off_by_more_than_half_a_step(name):
  grid, codes, values = jax.jit(rounded, static_argnums=1)(W, name)
  scale, zero = np.asarray(grid['scale'], np.float32), np.asarray(grid['zero'])
  assert scale.shape == (E, 1, O) == zero.shape
  assert (np.abs(values - W) <= 0.5001 * scale).all()
  assert codes.max() <= 2 ** BITS[name] - 1
  for e in range(E):
    for o in range(O):
      exact, near_zero = reference.uniform_grid(W[e, :, o], BITS[name])
      np.testing.assert_allclose(scale[e, 0, o], exact, rtol=2**-7)
      assert scale[e, 0, o] >= np.float32(exact) * (1 - 1e-6)
      assert abs(int(zero[e, 0, o]) - near_zero) <= 1


def test_weights_of_one_sign_and_none_keep_their_zero():
  w = jnp.array([[1.0, -2.0, 0.0], [3.0, -1.0, 0.0]])
  grid, _, values = rounded(w, 'int4')
  assert grid['zero'].tolist() == [[0, 15, 0]]
  np.testing.assert_allclose(values, w, atol=0.11)
  assert not values[:, 2].any()


def test_a_ternary_grid_is_told():
  w = jnp.array([[0.25, 1.0], [-1.0, 0.5], [0.5, 0.25]])
  grid, codes, _ = rounded(w, 'ternary')
  assert grid['low'].tolist() == [[-1.0, 0.0]]
  assert grid['high'].tolist() == [[0.5, 1.0]]
  # 0.25 is not above half of 0.5, and a unit without negatives has no low.
  assert codes.tolist() == [[0, 1], [-1, 0], [1, 0]]
