"""Grids of few values, and rounding to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import grids
from moe_jax.kernels.quantized import BITS
from tests import reference

E, I, O = 2, 9, 5
W = np.random.default_rng(0).normal(size=(E, I, O)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def rounded_to(w, bits):
  grid = grids.uniform(w, bits)
  return grid, grids.nearest(w, grid)


@pytest.mark.parametrize('bits', BITS)
def test_no_weight_is_off_by_more_than_half_a_step(bits):
  grid, rounded = rounded_to(W, bits)
  values, grid = np.asarray(rounded.values), jax.device_get(grid)
  assert grid.scale.shape == (E, 1, O) == grid.zero.shape
  assert (np.abs(values - W) <= 0.5001 * grid.scale.astype(np.float32)).all()
  assert rounded.codes.max() <= 2**bits - 1
  for e in range(E):
    for o in range(O):
      scale, zero = reference.uniform_grid(W[e, :, o], bits)
      np.testing.assert_allclose(grid.scale[e, 0, o], scale, rtol=2**-7)
      assert grid.scale[e, 0, o] >= np.float32(scale) * (1 - 1e-6)
      assert abs(int(grid.zero[e, 0, o]) - zero) <= 1


def test_weights_of_one_sign_and_none_keep_their_zero():
  w = jnp.array([[1.0, -2.0, 0.0], [3.0, -1.0, 0.0]])
  grid = grids.uniform(w, 4)
  assert grid.zero.tolist() == [[0, 15, 0]]
  np.testing.assert_allclose(grids.nearest(w, grid).values, w, atol=0.11)
  assert not grids.nearest(w, grid).values[:, 2].any()


def test_a_ternary_grid_is_told():
  w = jnp.array([[0.25, 1.0], [-1.0, 0.5], [0.5, 0.25]])
  grid = grids.ternary(w)
  assert grid.low.tolist() == [[-1.0, 0.0]]
  assert grid.high.tolist() == [[0.5, 1.0]]
  # 0.25 is not above half of 0.5, and a unit without negatives has no low.
  assert grids.nearest(w, grid).codes.tolist() == [[0, 1], [-1, 0], [1, 0]]
