"""Attention sinks: a logit in the softmax's denominator that weighs nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.layers import AttentionOptions
from moe_jax.layers.attention.dot_product import attend
from moe_jax.layers.attention.keys import Keys, masked_softmax
from moe_jax.partitioning import make_mesh
from tests.layers.attention.test_dot_product import layer
from tests.models import tiny

B, H, N, D = 2, 4, 2, 6


def arrays(seq_len, seed=0):
  """(query, key, value, sinks), and the segments of the rows."""
  rng = np.random.default_rng(seed)
  shapes = [(B, seq_len, heads, D) for heads in (H, N, N)]
  drawn = [
    jnp.asarray(rng.normal(size=s), jnp.float32) for s in (*shapes, (H,))
  ]
  segment_ids = np.ones((B, seq_len), np.int32)
  segment_ids[0, seq_len // 3 :] = 2
  return drawn, jnp.asarray(segment_ids)


@functools.cache
def program(implementation, window=0):
  def loss(arguments, segment_ids):
    query, key, value, sinks = arguments
    y = attend(
      query, key, value, segment_ids, implementation=implementation,
      keys=Keys(window=window), sinks=sinks,
    )  # fmt: skip
    toward = jnp.cos(jnp.arange(D))[None, None, None]
    return (y * toward).sum(), y

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_weights_by_hand():
  # Scores are ln 1 and ln 3, and the sink is ln 4; the third key is hidden.
  scores = jnp.log(jnp.array([[[[1.0, 3.0, 5.0]]]]))
  mask = jnp.array([[[[True, True, False]]]])
  sinks = jnp.log(jnp.array([4.0])).reshape(1, 1, 1, 1)
  weights = masked_softmax(scores, mask, sinks)
  np.testing.assert_allclose(weights[0, 0, 0], [1 / 8, 3 / 8, 0], rtol=1e-6)


def test_equals_a_key_of_that_score_without_a_value():
  (query, key, value, sinks), _ = arrays(5)
  y = attend(query, key, value, None, sinks=sinks, implementation='einsum')
  for b, t, h in np.ndindex(B, 5, H):
    n = h // (H // N)
    scores = np.asarray(key)[b, : t + 1, n] @ np.asarray(query)[b, t, h]
    weights = np.exp(np.append(scores * D**-0.5, sinks[h]))
    mean = weights[:-1] @ np.asarray(value)[b, : t + 1, n] / weights.sum()
    np.testing.assert_allclose(y[b, t, h], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('implementation', 'seq_len', 'window'),
  [
    ('blocks', 150, 40),
    pytest.param('blocks', 150, 0, marks=pytest.mark.slow),
    pytest.param('splash', 128, 0, marks=pytest.mark.slow),
  ],
)
def test_implementations_agree_in_value_and_gradient(
  implementation, seq_len, window
):
  args = arrays(seq_len)
  (_, y), gradient = program(implementation, window)(*args)
  (_, expected), expected_gradient = program('einsum', window)(*args)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  assert np.abs(gradient[3]).min() > 1e-3
  for leaf, expected_leaf in zip(gradient, expected_gradient, strict=True):
    np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  'implementation', ['blocks', pytest.param('splash', marks=pytest.mark.slow)]
)
def test_heads_on_several_devices_change_nothing(implementation):
  arguments, segment_ids = arrays(128)
  expected = program('einsum')(arguments, segment_ids)
  mesh = make_mesh(dict(tensor=2, data=2), jax.devices()[:4])

  def shard(leaf, *spec):
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

  *rows, sinks = arguments
  split = [shard(leaf, 'data', None, 'tensor') for leaf in rows]
  result = program(implementation)(
    [*split, shard(sinks, 'tensor')], shard(segment_ids, 'data')
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    result,
    expected,
  )


@pytest.mark.parametrize('implementation', ['xla', 'cudnn'])
def test_implementations_without_sinks_are_refused(implementation):
  module = layer(implementation, dtype='bfloat16')
  options = AttentionOptions(H, N, 8, sinks=True, implementation=implementation)
  x, positions = jnp.zeros((B, 4, 10)), jnp.zeros((B, 4), jnp.int32)
  with pytest.raises(ValueError, match='it has no attention sinks'):
    jax.eval_shape(
      module.clone(options=options).init, tiny.key(0), x, None, positions
    )
