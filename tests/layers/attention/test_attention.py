"""A layer of attention equals its definition, with each of its options.

The oracle is `jax.nn.dot_product_attention` between products, norms and clips
in numpy. How weights are computed is in `test_implementations.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import Attention, AttentionOptions, Gpt2, Numerics, Shared
from moe_jax.layers.parameters import roles_of
from tests.models import tiny

B, T, M, H, N, D = 3, 7, 10, 4, 2, 6
EPSILON = 0.03


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


def parameters(qk_norm='none', biased=(), kv_heads=N):
  heads = {'query': H, 'key': kv_heads, 'value': kv_heads}
  shapes = {f'w_{name}': (M, n, D) for name, n in heads.items()}
  shapes['w_out'] = (H, D, M)
  for name in biased:
    shapes[f'b_{name}'] = (heads[name], D) if name in heads else (M,)
  for name in ('query', 'key') if qk_norm != 'none' else ():
    shapes[f'{name}_norm'] = (D,) if qk_norm == 'head' else (heads[name], D)
  return draw(shapes)


def normed(x, scale):
  """Queries or keys [B, T, N, D], over a head or over all, in float64."""
  axes = (-2, -1)[-scale.ndim :]
  square = np.mean(np.float64(x) ** 2, axes, keepdims=True)
  return np.asarray(scale) * x / np.sqrt(square + EPSILON)


def defined_output(p, x, mask, bias, clip):
  heads = {}
  for name in ('query', 'key', 'value'):
    y = np.einsum('btm,mhd->bthd', x, p[f'w_{name}'])
    y = np.asarray(y) + np.asarray(p.get(f'b_{name}', 0))
    if f'{name}_norm' in p:
      y = normed(y, p[f'{name}_norm'])
    heads[name] = jnp.asarray(np.clip(y, -clip, clip), jnp.float32)
  y = jax.nn.dot_product_attention(**heads, mask=mask, bias=bias)
  y = np.einsum('bthd,hdm->btm', y, p['w_out'])
  return y + np.asarray(p.get('b_out', 0))


def make(kv_heads=N, shared=Shared(), causal=True, dropout=0.0, **options):
  if options.get('qk_norm', 'none') != 'none':
    options['qk_norm_epsilon'] = EPSILON
  options = AttentionOptions(H, kv_heads, D, **options)
  return Attention(options, shared, causal=causal, dropout=dropout)


ALL = ('query', 'key', 'value', 'out')


@pytest.mark.parametrize(
  ('options', 'biased'),
  [
    (dict(kv_heads=1), ()),
    (dict(causal=False, shared=Shared(use_bias=True)), ALL),
    (dict(kv_heads=H, qk_norm='head', biases='all'), ALL),
    (dict(qk_norm='all', clip=0.7), ()),
    (dict(clip=0.5, biases='query, key, value'), ('query', 'key', 'value')),
  ],
)
def test_equals_its_definition(options, biased):
  x, segment_ids, positions = inputs()
  kv_heads, clip = options.get('kv_heads', N), options.get('clip', np.inf)
  p = parameters(options.get('qk_norm', 'none'), biased, kv_heads)
  module = make(**options)
  boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs())['params']
  shapes = {k: v.shape for k, v in nn.meta.unbox(boxed).items()}
  assert shapes == {k: v.shape for k, v in p.items()}
  forms = {'w': ('attention', 'kernel'), 'b': ('attention', 'bias')}
  for name, role in roles_of(boxed).items():
    assert role == forms.get(name.split('_')[0], ('norm', 'scale'))
  bias = draw({'bias': (H, T, T)}, seed=3)['bias']
  y = jax.jit(module.apply)({'params': p}, x, segment_ids, positions, bias)
  mask = defined_mask(segment_ids, options.get('causal', True))
  expected = defined_output(p, x, mask, bias[None], clip)
  np.testing.assert_allclose(y, expected, rtol=2e-5, atol=1e-5)


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
  np.testing.assert_allclose(np.float32(y[0, 1, 3]), expected, atol=0.01)


def test_dropout_is_unbiased_and_only_in_training():
  (x, ids, positions), n = inputs(), 400
  params, layer = {'params': parameters()}, make(dropout=0.5)
  plain = np.asarray(make().apply(params, x, ids, positions))
  evaluated = layer.apply(params, x, ids, positions)
  np.testing.assert_allclose(plain, evaluated, rtol=1e-5, atol=1e-6)
  args = (jnp.tile(x[:1], (n, 1, 1)), None, jnp.tile(positions[:1], (n, 1)))
  rngs = {'dropout': tiny.key(0)}
  train = jax.jit(lambda p: layer.apply(p, *args, train=True, rngs=rngs))
  draws = np.asarray(train(params))
  assert np.abs(draws[0] - plain[0]).max() > 0.1
  error = draws.std(0) / np.sqrt(n)
  np.testing.assert_array_less(abs(draws.mean(0) - plain[0]), 5 * error + 1e-5)


def test_scores_that_are_not_scaled_start_as_those_that_are():
  # The standard deviation of 2500 draws is known to about 1.4 %.
  def start(scale):
    options = AttentionOptions(5, head_width=16, scale=scale)
    layer = Attention(options, Shared(Numerics(init=Gpt2())))
    x, positions = jnp.ones((1, 2, 32)), jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(layer.init)(tiny.key(0), x, None, positions)['params']
    params = nn.meta.unbox(params)
    return [np.std(np.asarray(params[f'w_{n}'])) for n in ('query', 'key')]

  query, key = start('head_width')
  expected = [query / 16**0.5, key]
  np.testing.assert_allclose(start('none'), expected, rtol=0.05)


def test_an_encoder_and_its_memory_have_no_window():
  x, segment_ids, positions = inputs()
  keys = dict(memory=x, key_segment_ids=segment_ids)
  args = {'params': parameters()}, x, segment_ids, positions
  for causal, cross in ((True, False), (False, False), (False, True)):
    layers = (
      Attention(AttentionOptions(H, N, D, window=w), causal=causal, cross=cross)
      for w in (0, 2)
    )
    outputs = [layer.apply(*args, **keys) for layer in layers]
    assert np.array_equal(*outputs) == (not causal)
