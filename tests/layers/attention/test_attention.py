"""Attention equals two other implementations; its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import (
  Attention,
  AttentionOptions,
  Gpt2,
  Numerics,
  Rotary,
  Shared,
)
from moe_jax.layers.parameters import roles_of
from tests.models import tiny

B, T, M, H, N, D = 3, 7, 10, 4, 2, 6


def inputs(seed=0):
  """Rows of one, two and three documents: (x, segment_ids, positions)."""
  x = np.random.default_rng(seed).normal(size=(B, T, M)).astype(np.float32)
  segment_ids = [[1] * 7, [1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 3, 0, 0]]
  positions = [[*range(7)], [0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 2, 0, 0, 0]]
  return tuple(map(jnp.asarray, (x, segment_ids, positions)))


def defined_mask(segment_ids, causal=True):
  """The mask by definition, token by token, [B, 1, T, T]."""
  ids, mask = np.asarray(segment_ids), np.zeros((B, 1, T, T), bool)
  for b, t, s in np.ndindex(B, T, T):
    mask[b, 0, t, s] = ids[b, t] == ids[b, s] and (s <= t or not causal)
  return jnp.asarray(mask)


def draw(shapes, seed=1):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32)
    for name, shape in shapes.items()
  }


def kernels(heads=H, kv_heads=N):
  return draw(
    {
      'w_query': (M, heads, D),
      'w_key': (M, kv_heads, D),
      'w_value': (M, kv_heads, D),
      'w_out': (heads, D, M),
    }
  )


def biases(heads=H, kv_heads=N):
  return draw(
    {
      'b_query': (heads, D),
      'b_key': (kv_heads, D),
      'b_value': (kv_heads, D),
      'b_out': (M,),
    },
    seed=2,
  )


def make(kv_heads=N, use_bias=False, **attributes):
  options = AttentionOptions(H, kv_heads, D)
  return Attention(options, Shared(use_bias=use_bias), **attributes)


def attend(params, *args, rngs=None, train=False, **options):
  layer = make(**options)
  run = jax.jit(lambda p: layer.apply(p, *args, train=train, rngs=rngs))
  return run({'params': params})


@pytest.mark.parametrize(
  ('kv_heads', 'causal'), [(1, True), (N, False), (H, True)]
)
def test_equals_jax_dot_product_attention(kv_heads, causal):
  x, segment_ids, positions = inputs()
  p = kernels(kv_heads=kv_heads)
  bias = draw({'bias': (H, T, T)}, seed=3)['bias']

  @jax.jit
  def other(x):
    query, key, value = (
      jnp.einsum('btm,mhd->bthd', x, p[f'w_{name}'])
      for name in ('query', 'key', 'value')
    )
    y = jax.nn.dot_product_attention(
      query, key, value, bias=bias[None], mask=defined_mask(segment_ids, causal)
    )
    return jnp.einsum('bthd,hdm->btm', y, p['w_out'])

  args = (x, segment_ids, positions, bias)
  y = attend(p, *args, kv_heads=kv_heads, causal=causal)
  np.testing.assert_allclose(y, other(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('use_bias', [False, True])
def test_equals_linen_with_its_weights_copied(use_bias):
  x, segment_ids, positions = inputs()
  params = kernels(kv_heads=H)
  if use_bias:
    params |= biases(kv_heads=H)
  linen_params = {}
  for name in ('query', 'key', 'value', 'out'):
    linen_params[name] = {'kernel': params[f'w_{name}']}
    if use_bias:
      linen_params[name]['bias'] = params[f'b_{name}']
  linen = nn.MultiHeadDotProductAttention(
    num_heads=H, qkv_features=H * D, out_features=M, use_bias=use_bias
  )
  run = jax.jit(
    lambda p: linen.apply({'params': p}, x, mask=defined_mask(segment_ids))
  )
  y = attend(params, x, segment_ids, positions, kv_heads=H, use_bias=use_bias)
  np.testing.assert_allclose(y, run(linen_params), rtol=1e-5, atol=1e-5)


def test_a_kv_head_serves_adjacent_query_heads():
  x, segment_ids, positions = inputs()
  grouped = kernels()
  repeated = {
    name: np.repeat(w, H // N, axis=1) if name in ('w_key', 'w_value') else w
    for name, w in grouped.items()
  }
  np.testing.assert_allclose(
    attend(grouped, x, segment_ids, positions),
    attend(repeated, x, segment_ids, positions, kv_heads=H),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize('use_bias', [False, True])
def test_parameters_have_their_own_head_width_and_biases_only_on_request(
  use_bias,
):
  x, segment_ids, positions = inputs()
  layer = make(use_bias=use_bias)
  boxed = jax.eval_shape(
    layer.init, jax.random.key(0), x, segment_ids, positions
  )
  shapes = jax.tree.map(lambda leaf: leaf.shape, nn.meta.unbox(boxed))
  expected = kernels() | (biases() if use_bias else {})
  assert shapes['params'] == {k: v.shape for k, v in expected.items()}


def test_bfloat16_scores_are_float32():
  # Query 1 has scores of 256 and 257. bfloat16 has no 257: their difference
  # would be 0 or 2, and key 1's weight 0.5 or 0.88.
  x = jnp.array([[[16, 0, 0, 0], [16, 1, 0, 1]]], jnp.bfloat16)
  head = np.eye(4, dtype=np.float32)[:, None]
  p = {
    'w_query': 2 * head,  # cancels the scale 1 / sqrt(4)
    'w_key': head * [1.0, 1, 0, 0],
    'w_value': head * [0.0, 0, 0, 1],
    'w_out': head.swapaxes(0, 1),
  }
  shared = Shared(Numerics('bfloat16'))
  layer = Attention(AttentionOptions(1), shared)
  positions = jnp.array([[0, 1]])
  y = jax.jit(lambda p: layer.apply({'params': p}, x, None, positions))(p)
  assert y.dtype == jnp.bfloat16
  expected = np.e / (1 + np.e)  # about 0.73
  np.testing.assert_allclose(
    np.asarray(y, np.float32)[0, 1, 3], expected, atol=0.01
  )


def test_dropout_is_unbiased_and_only_in_training():
  x, segment_ids, positions = inputs()
  p, n = kernels(), 400
  plain = np.asarray(attend(p, x, segment_ids, positions))
  evaluated = attend(p, x, segment_ids, positions, dropout=0.5)
  np.testing.assert_array_equal(plain, evaluated)
  rngs = {'dropout': tiny.key(0)}
  args = (jnp.tile(x[:1], (n, 1, 1)), None, jnp.tile(positions[:1], (n, 1)))
  draws = np.asarray(attend(p, *args, dropout=0.5, train=True, rngs=rngs))
  assert np.abs(draws[0] - plain[0]).max() > 0.1
  error = draws.std(0) / np.sqrt(n)
  np.testing.assert_array_less(abs(draws.mean(0) - plain[0]), 5 * error + 1e-5)


def test_scores_that_are_not_scaled_start_as_those_that_are():
  # The standard deviation of 2500 draws is known to about 1.4 %.
  def start(scale):
    options = AttentionOptions(5, head_width=16, scale=scale)
    layer = Attention(options, Shared(Numerics(init=Gpt2())))
    x, positions = jnp.ones((1, 2, 32)), jnp.zeros((1, 2), jnp.int32)

    @jax.jit
    def init(key):
      params = nn.meta.unbox(layer.init(key, x, None, positions))['params']
      return {name: params[name] for name in ('w_query', 'w_key')}

    params = init(tiny.key(0))
    return {k: np.std(np.asarray(w)) for k, w in params.items()}

  scaled, unscaled = start('head_width'), start('none')
  np.testing.assert_allclose(
    unscaled['w_query'], scaled['w_query'] / 16**0.5, rtol=0.05
  )
  np.testing.assert_allclose(unscaled['w_key'], scaled['w_key'], rtol=0.05)


def test_its_parameters_are_those_of_attention():
  x, segment_ids, positions = inputs()
  layer = make(use_bias=True)
  boxed = jax.eval_shape(
    layer.init, jax.random.key(0), x, segment_ids, positions
  )
  roles = roles_of(boxed['params'])
  assert roles['w_out'] == ('attention', 'kernel')
  assert roles['b_query'] == ('attention', 'bias')


def test_sizes_that_are_zero_are_those_of_the_model():
  options = AttentionOptions(num_heads=4).within(24)
  assert (options.num_kv_heads, options.head_width) == (4, 6)
  explicit = AttentionOptions(num_heads=4, num_kv_heads=2, head_width=5)
  assert explicit.within(24) == explicit
  with pytest.raises(ValueError, match='num_heads=4 does not divide width=10'):
    AttentionOptions(num_heads=4).within(10)


def test_an_encoder_and_its_memory_have_no_window():
  x, segment_ids, positions = inputs()
  for causal, cross in ((True, False), (False, False), (False, True)):
    outputs = [
      Attention(
        AttentionOptions(H, N, D, window=window), causal=causal, cross=cross
      ).apply(
        {'params': kernels()},
        x,
        segment_ids,
        positions,
        memory=x,
        key_segment_ids=segment_ids,
      )
      for window in (0, 2)
    ]
    assert np.array_equal(*outputs) == (not causal)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(num_kv_heads=3), 'num_kv_heads=3 does not divide num_heads=4'),
    (dict(num_heads=0), 'num_heads=0 must be at least 1'),
    (dict(head_width=-1), 'head_width=-1 must be at least 0'),
    (dict(scale='rms'), "unknown scale 'rms'"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    AttentionOptions(**options)


def test_rotary_positions_need_pairs():
  (problem,) = Rotary().problems_with(head_width=5, causal=True)
  assert 'head_width=5 must be even' in problem
