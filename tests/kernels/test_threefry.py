"""Straight code gives the random numbers of JAX's own generator."""

import jax
import numpy as np
import pytest

from moe_jax.kernels import threefry


@pytest.mark.parametrize('draw', [jax.random.uniform, jax.random.gumbel])
def test_numbers_are_those_of_jax(draw):
  def numbers(impl):
    key = jax.random.key(np.uint32(7), impl=impl)
    first, second = jax.random.split(jax.random.fold_in(key, 3))
    return draw(first, (3, 5, 7)), jax.vmap(lambda k: draw(k, (4,)))(
      jax.random.split(second, 6)
    )

  unrolled = jax.jit(lambda: numbers(threefry.UNROLLED))()
  expected = jax.jit(lambda: numbers('threefry2x32'))()
  for a, b in zip(unrolled, expected, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('shape', [(2, 3, 6), (5, 4), (8,), (3, 7), (4, 0)])
def test_bits_written_by_halves_are_those_of_jax(shape, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(threefry, '_LEAST_IN_LOOP', 8)

  def draw(impl):
    return jax.random.bits(jax.random.key(1, impl=impl), shape)

  np.testing.assert_array_equal(draw(threefry.UNROLLED), draw(None))


def test_a_generator_that_was_chosen_is_kept():
  with jax.default_prng_impl('rbg'):
    key = threefry.key(jax.numpy.uint32(7))
    assert key.dtype == jax.random.key(7).dtype
  assert threefry.key(jax.numpy.uint32(7)).dtype != jax.random.key(7).dtype


def test_bits_of_other_widths_are_jaxs_too():
  for dtype in (np.uint8, np.uint16):
    a, b = (
      jax.random.bits(jax.random.key(1, impl=impl), (9,), dtype)
      for impl in (threefry.UNROLLED, None)
    )
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_no_loop_is_left():
  def draw(impl):
    return jax.random.uniform(jax.random.key(1, impl=impl), (8, 9))

  text = jax.jit(lambda: draw(threefry.UNROLLED)).lower().as_text()
  # The loop that is left makes the key, whose counters are few.
  assert text.count('xor') > 20
