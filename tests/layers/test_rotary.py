"""Rotary positions for long texts, in parts of heads and of neighbours.

They are told by hand here; that whole models turn as those of transformers do
is in `tests/interop`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import Rotary
from moe_jax.layers.rotary import LongRope, Yarn
from tests.layers.test_positions import draw

B, T, H, D = 2, 5, 3, 8


def test_yarn_by_hand():
  # With theta=16 and 8 numbers the 4 pairs turn by 1, 1/2, 1/4 and 1/8. In 32
  # tokens a pair turns c times at place 8 ln(32 / (2 pi c)) / (2 ln 16): once
  # at 2.35, twice at 1.35. Pairs 0 and 1 stay, pair 2 is 65 % and pair 3 all
  # four times slower.
  yarn = Yarn(
    factor=4.0, original_len=32, beta_fast=2.0, beta_slow=1.0, truncate=False
  )
  frequency, factor = yarn.turns(16.0, 8)
  slow = 2 - 4 * np.log(32 / (4 * np.pi)) / np.log(16)
  expected = [1, 0.5, 0.25 * (1 - slow) + 0.0625 * slow, 0.125 / 4]
  assert 0.6 < slow < 0.7
  np.testing.assert_allclose(frequency, expected, rtol=1e-6)
  assert factor == pytest.approx(0.1 * np.log(4) + 1)
  # Bounds that are rounded are pairs 1 and 3, and pair 2 is half way.
  rounded = Yarn(factor=4.0, original_len=32, beta_fast=2.0).turns(16.0, 8)
  assert rounded.frequency[2] == pytest.approx(0.25 * 0.5 + 0.0625 * 0.5)


def test_the_factors_of_yarn():
  def factors(**options):
    yarn = Yarn(factor=2.718281828459045, **options)
    return yarn.turns(1e4, 8).factor, yarn.latent_factor

  # ln(factor) is 1.
  assert factors() == pytest.approx((1.1, 1.0))
  assert factors(mscale=2.0) == pytest.approx((1.1, 1.0))
  assert factors(mscale_all_dim=2.0) == pytest.approx((1.1, 1.44))
  equal = factors(mscale=0.707, mscale_all_dim=0.707)
  assert equal == pytest.approx((1.0, 1.0707**2))
  unequal = factors(mscale=1.0, mscale_all_dim=0.5)
  assert unequal == pytest.approx((1.1 / 1.05, 1.05**2))
  assert factors(attention_factor=0.3)[0] == 0.3


# ln(16) / ln(4) is 2.
SHORT, LONG = ((1.0, 2.0), np.sqrt(3)), ((4.0, 8.0), 1.5)


@pytest.mark.parametrize(
  ('positions', 'segment_ids', 'long'),
  [
    # Each row is one document.
    ([[0, 1, 2, 3], [1, 2, 3, 4]], None, [[0, 0, 0, 0], [1, 1, 1, 1]]),
    # A long document stands between two short ones, and padding behind them.
    (
      [[0, 0, 1, 2, 3, 4, 0, 7], [0, 1, 0, 1, 2, 3, 4, 5]],
      [[3, 1, 1, 1, 1, 1, 2, 0], [4, 4, 6, 6, 6, 6, 6, 6]],
      [[0, 1, 1, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1, 1, 1]],
    ),
    # Padding counts on where a short row ends.
    ([[0, 1, 2, 3, 4, 5]], [[1, 1, 1, 0, 0, 0]], [[0, 0, 0, 1, 1, 1]]),
  ],
)
def test_documents_of_longrope_are_short_or_long_by_themselves(
  positions, segment_ids, long
):
  scaling = LongRope(
    short_factor=SHORT[0],
    long_factor=LONG[0],
    original_len=4,
    factor=16.0,
    long_mscale=LONG[1],
  )
  positions = jnp.array(positions)
  if segment_ids is not None:
    segment_ids = jnp.array(segment_ids)
  x = draw(*positions.shape, H, 4)
  y = jax.jit(Rotary(100.0, scaling=scaling).rotate)(x, positions, segment_ids)
  for (row, t), is_long in np.ndenumerate(long):
    factors, mscale = LONG if is_long else SHORT
    angle = float(positions[row, t]) * np.array([1, 0.1]) / factors
    turn = mscale * np.exp(1j * angle)
    pairs = (x[row, t, :, :2] + 1j * x[row, t, :, 2:]) * turn[None]
    expected = np.concatenate([pairs.real, pairs.imag], axis=1)
    np.testing.assert_allclose(y[row, t], expected, rtol=1e-5, atol=1e-5)


def test_pairs_are_neighbours_or_of_two_halves():
  x, positions = draw(B, T, H, D), jnp.arange(B * T).reshape(B, T)
  order = [0, 4, 1, 5, 2, 6, 3, 7]
  halves = jax.jit(Rotary().rotate)(x, positions)
  neighbours = jax.jit(Rotary(interleaved=True).rotate)(
    x[..., np.array(order)], positions
  )
  np.testing.assert_allclose(neighbours, halves[..., np.array(order)])


def test_a_part_of_each_head_turns():
  x, positions = draw(B, T, H, D), jnp.arange(B * T).reshape(B, T)
  y = jax.jit(Rotary(fraction=0.5).rotate)(x, positions)
  part = jax.jit(Rotary().rotate)(x[..., :4], positions)
  np.testing.assert_array_equal(y[..., :4], part)
  np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
