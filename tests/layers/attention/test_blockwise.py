"""Attention by blocks of queries equals the plain one, with all options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attention.blockwise import blocks_of
from moe_jax.layers.attention.dot_product import attend
from moe_jax.layers.attention.keys import Keys

B, H, N, D = 2, 6, 2, 5


def arrays(T, S, dtype, seed=0):
  rng = np.random.default_rng(seed)
  shapes = ((B, T, H, D), (B, S, N, D), (B, S, N, D))
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def segments(length, seed):
  """Two documents and, in the second row, padding at the end."""
  rng = np.random.default_rng(seed)
  ids = np.sort(rng.integers(1, 3, (B, length)), axis=1)
  ids[1, -length // 4 :] = 0
  return jnp.asarray(ids, jnp.int32)


def with_gradients(implementation, arguments, bias, toward, **options):
  """The output, and the gradients of queries, keys, values and the bias."""

  def loss(arguments, bias):
    y = attend(*arguments, implementation=implementation, bias=bias, **options)
    return (y.astype(jnp.float32) * toward).sum(), y

  value_and_gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  (_, y), grads = jax.jit(value_and_gradient)(tuple(arguments), bias)
  return y, *grads


@pytest.mark.parametrize(
  ('T', 'S', 'keys', 'packed', 'biased', 'dtype'),
  [
    # Three blocks of which the last is smaller; a bias that is learned.
    (150, 150, Keys(), True, True, 'float32'),
    # The window leaves keys out on both sides.
    (150, 150, Keys(window=37, scale=1.0), False, False, 'float32'),
    # A decoder that reads the output of an encoder.
    (70, 90, Keys(causal=False, cross=True), True, True, 'float32'),
    (70, 70, Keys(), True, False, 'bfloat16'),
    # A row of one token.
    (1, 1, Keys(), True, False, 'float32'),
  ],
)
def test_equals_einsum_in_value_and_gradient(T, S, keys, packed, biased, dtype):
  arguments = arrays(T, S, dtype)
  rng = np.random.default_rng(1)
  toward = rng.normal(size=(B, T, H, D)).astype(np.float32)
  bias = None
  if biased:
    bias = jnp.asarray(rng.normal(size=(H, T, S)), jnp.float32)
  ids = segments(T, 2) if packed else None
  options = dict(keys=keys, segment_ids=ids)
  if packed and keys.cross:
    # Some queries see no key at all, as their document has none.
    options['key_segment_ids'] = segments(S, 3).at[0].set(1)
  run = functools.partial(with_gradients, bias=bias, toward=toward, **options)
  tolerance = 2e-5 if dtype == 'float32' else 0.05
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance
    ),
    run('blocks', arguments),
    run('einsum', arguments),
  )


def test_a_query_that_sees_no_key_has_the_mean_of_all_values():
  """The mean counts, as padding may be routed and take slots from others."""
  T = 70
  query, key, value = arrays(T, T, 'float32')
  ids, key_ids = np.ones((2, B, T), np.int32)
  key_ids[:, :40] = 0  # queries 0 to 39 see no key
  ids, key_ids = jnp.asarray(ids), jnp.asarray(key_ids)
  options = dict(segment_ids=ids, key_segment_ids=key_ids)
  toward = np.random.default_rng(1).normal(size=(B, T, H, D))
  run = functools.partial(
    with_gradients, bias=None, toward=toward.astype(np.float32), **options
  )
  y, *_ = by_blocks = run('blocks', (query, key, value))
  mean = np.repeat(np.asarray(value).mean(1), H // N, axis=1)
  np.testing.assert_allclose(y[:, 5], mean, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
    by_blocks,
    run('einsum', (query, key, value)),
  )


def test_a_memory_without_segments_is_one_segment():
  query, key, value = arrays(70, 50, 'float32')
  run = jax.jit(
    functools.partial(attend, keys=Keys(causal=False, cross=True)),
    static_argnames='implementation',
  )
  outputs = [
    run(query, key, value, ids, implementation=name)
    for name in ('blocks', 'einsum')
    for ids in (segments(70, 2), None)
  ]
  for y in outputs[1:]:
    np.testing.assert_allclose(y, outputs[0], atol=1e-5)


def test_hidden_keys_are_left_out():
  bounds = [tuple(b) for b in blocks_of(150, 150, Keys())]
  assert bounds == [(0, 64, 0, 64), (64, 128, 0, 128), (128, 150, 0, 150)]
  # Query 64 is the first of its block; with 20 keys it sees 45 to 64.
  bounds = [tuple(b) for b in blocks_of(150, 150, Keys(window=20))]
  assert bounds[1] == (64, 128, 32, 128)
  bounds = [tuple(b) for b in blocks_of(100, 90, Keys(causal=False))]
  assert bounds == [(0, 64, 0, 90), (64, 100, 0, 90)]
  # A window that is longer than the row hides nothing.
  assert blocks_of(70, 70, Keys(window=99)) == blocks_of(70, 70, Keys())
  # A long row has few blocks, as each is compiled.
  assert len(blocks_of(4096, 4096, Keys())) == 8


@pytest.mark.parametrize('implementation', ['blocks', 'einsum'])
def test_only_einsum_keeps_scores(implementation):
  T = 130
  ids = segments(T, 2)
  f = functools.partial(attend, implementation=implementation)
  query, key, value = arrays(T, T, 'float32')
  pull = jax.eval_shape(
    lambda *qkv: jax.vjp(lambda q, k, v: f(q, k, v, ids), *qkv)[1],
    query,
    key,
    value,
  )
  largest = max(leaf.size for leaf in jax.tree.leaves(pull))
  assert (largest >= B * H * T * T) == (implementation == 'einsum')


def test_a_cpu_chooses_blocks():
  """No array of all scores is left, not even where two layers are a loop.

  The choice by platform returns what each implementation keeps, as zeros.
  """
  T = 130
  q, k, v = arrays(T, T, 'float32')

  def scores_kept(implementation):
    def layer(x, w):
      y = attend(w * x, k, v, None, implementation=implementation)
      return y, None

    def loss(w):
      return jax.lax.scan(layer, q, w)[0].sum()

    w = jnp.ones(2)
    text = jax.jit(jax.grad(loss)).lower(w).compile().as_text()
    return f'{B},{N},{H // N},{T},{T}]' in text

  assert scores_kept('einsum')
  assert not scores_kept('auto')
