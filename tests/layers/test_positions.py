"""Rotary positions, relative buckets and sinusoids are those made by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import Attention, AttentionOptions, Rotary
from moe_jax.layers.positions import (
  POSITIONS,
  Learned,
  NoPositions,
  Relative,
  Sinusoidal,
  distance_bucket,
  sinusoids,
)

B, T, H, D = 2, 5, 3, 4


def draw(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=2)
def turned(x, positions, theta):
  return Rotary(theta).rotate(x, positions)


def test_rotate_by_hand():
  # With D=4 and theta=100 pair (0, 2) turns by 1 radian a position and pair (1,
  # 3) by 1/10. At position 2 the vector (1, 3) turns by 2, and (2, 4) by 0.2.
  x = jnp.array([[[[1.0, 2.0, 3.0, 4.0]]]])
  expected = [
    1 * np.cos(2) - 3 * np.sin(2),
    2 * np.cos(0.2) - 4 * np.sin(0.2),
    3 * np.cos(2) + 1 * np.sin(2),
    4 * np.cos(0.2) + 2 * np.sin(0.2),
  ]
  rotated = turned(x, jnp.array([[2]]), 100.0)
  np.testing.assert_allclose(rotated, [[[expected]]], rtol=1e-5)


def test_bfloat16_is_turned_in_float32():
  # The angle is 1001 radians, which bfloat16 would round to 1000.
  x = draw(1, 1, H, D).astype(jnp.bfloat16)
  positions = jnp.array([[1001]])
  exact = turned(x.astype(jnp.float32), positions, 1e4)
  rotated = turned(x, positions, 1e4)
  assert rotated.dtype == jnp.bfloat16
  np.testing.assert_array_equal(rotated, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize('rotary', [False, True])
def test_attention_uses_positions_only_if_rotary(rotary):
  positions = Rotary() if rotary else NoPositions()
  layer = Attention(AttentionOptions(H, head_width=D), positions=positions)
  x = draw(B, T, 7)
  ids = np.tile(np.arange(T, dtype=np.int32), (B, 1))
  params = jax.eval_shape(layer.init, jax.random.key(0), x, None, ids)
  params = jax.tree.map(lambda leaf: draw(*leaf.shape), nn.meta.unbox(params))
  run = jax.jit(lambda positions: layer.apply(params, x, None, positions))
  np.testing.assert_allclose(run(ids), run(ids + 40), rtol=1e-4, atol=1e-4)
  changed = np.abs(np.asarray(run(ids)) - run(2 * ids)).max() > 1e-3
  assert changed == rotary


def test_buckets_are_exact_then_logarithmic_then_shared():
  # There are 8 buckets up to 32. Distances 0 to 3 have one each. Bucket 4 + j
  # starts at 4 * 8^(j/4): 4, 6.7, 11.3, 19.03; the last has all larger
  # distances.
  distance = [0, 1, 2, 3, 4, 6, 7, 11, 12, 19, 20, 31, 32, 33, 99, 1000]
  expected = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7, 7, 7]
  buckets = distance_bucket(np.array(distance), 8, 32)
  np.testing.assert_array_equal(buckets, expected)


def test_relative_bias_reads_its_table_by_head_and_distance():
  layer = Relative(buckets=6, max_distance=12).bias(H, True, None)
  table = draw(H, 6)
  bias = np.asarray(layer.apply({'params': {'table': table}}, 9, 9))
  # There are 6 buckets up to 12: 0, 1 and 2 are exact, 3 starts at 3, 4 at 4.8,
  # 5 at 7.6.
  bucket = [0, 1, 2, 3, 3, 4, 4, 4, 5]
  for t in range(9):
    for s in range(t + 1):
      expected = np.asarray(table)[:, bucket[t - s]]
      np.testing.assert_array_equal(bias[:, t, s], expected)


def test_both_ways_later_keys_have_buckets_of_their_own():
  layer = Relative(8, 6).bias(H, False, None)
  table = draw(H, 8)
  bias = np.asarray(layer.apply({'params': {'table': table}}, 5, 9))
  # Each side has four buckets up to 6: 0 and 1 are exact, 2 starts at 2, 3 at
  # 3.46.
  bucket = np.array([0, 1, 2, 2, 3, 3, 3, 3, 3])
  for t, s in np.ndindex(5, 9):
    index = bucket[abs(t - s)] + (4 if s > t else 0)
    np.testing.assert_array_equal(bias[:, t, s], np.asarray(table)[:, index])


def test_sinusoids_by_hand():
  # M = 5 has two wavelengths, 2 pi and 10000 * 2 pi, and a zero.
  waves = np.asarray(sinusoids(jnp.array([[0, 3]]), 5))
  far, near = 3 / 10_000, 3
  expected = [
    [0, 0, 1, 1, 0],
    [np.sin(near), np.sin(far), np.cos(near), np.cos(far), 0],
  ]
  np.testing.assert_allclose(waves[0], expected, rtol=1e-5, atol=1e-7)


def test_each_kind_adds_what_it_should_to_the_embedding():
  x, tokens = draw(1, 3, 4), jnp.array([[7, 2, 0]])
  ids = jnp.array([[0, 1, 1]])
  mask = jnp.array([[True, True, False]])
  table = draw(5, 4, seed=1)

  def added(positions):
    return np.asarray(positions.add(x, tokens, mask, ids, table) - x)[0]

  for kind in POSITIONS.builtin.values():
    assert kind().added == (kind in (Learned, Sinusoidal))
  for kind in (NoPositions(), Rotary(), Relative()):
    assert not added(kind).any()
  learned = Learned(5)
  assert learned.table_len == 5 and Learned().within(9).table_len == 9
  np.testing.assert_allclose(
    added(learned), np.asarray(table)[[0, 1, 1]], rtol=1e-5, atol=1e-6
  )
  # The first token has position 3, where numbers begin. The second has the id
  # of the position before, and the third is padding.
  waves = np.asarray(sinusoids(jnp.array([[3]]), 4))[0, 0]
  embedding = added(Sinusoidal(offset=3))
  np.testing.assert_allclose(embedding[0], waves, rtol=1e-5, atol=1e-6)
  assert not embedding[1:].any()
