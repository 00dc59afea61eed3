"""Norms of queries and keys, clipping and biases, by their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.layers import Attention, AttentionOptions, Shared
from moe_jax.layers.attention.attention import project_memory
from moe_jax.layers.parameters import roles_of
from moe_jax.partitioning import make_mesh
from tests.layers.attention.test_attention import (
  D,
  H,
  N,
  biases,
  defined_mask,
  draw,
  inputs,
  kernels,
)

SCALES = {
  'head': {'query_norm': (D,), 'key_norm': (D,)},
  'all': {'query_norm': (H, D), 'key_norm': (N, D)},
  'none': {},
}
EPSILON = 0.03


def normed(x, scale):
  """Each token's queries or keys x [B, T, N, D] by definition."""
  x, y = np.asarray(x, np.float64), np.zeros(x.shape)
  for b, t in np.ndindex(x.shape[:2]):
    if scale.ndim == 2:
      square = np.mean(x[b, t] ** 2)
      y[b, t] = scale * x[b, t] / np.sqrt(square + EPSILON)
    else:
      for n in range(x.shape[2]):
        square = np.mean(x[b, t, n] ** 2)
        y[b, t, n] = scale * x[b, t, n] / np.sqrt(square + EPSILON)
  return y


def defined_output(p, x, segment_ids, clip):
  heads = {}
  for name in ('query', 'key', 'value'):
    y = np.einsum('btm,mhd->bthd', x, p[f'w_{name}'])
    y = np.asarray(y) + np.asarray(p.get(f'b_{name}', 0))
    if f'{name}_norm' in p:
      y = normed(y, np.asarray(p[f'{name}_norm']))
    if clip:
      y = np.minimum(np.maximum(y, -clip), clip)
    heads[name] = jnp.asarray(y, jnp.float32)
  y = jax.nn.dot_product_attention(**heads, mask=defined_mask(segment_ids))
  y = np.einsum('bthd,hdm->btm', y, p['w_out'])
  return y + np.asarray(p.get('b_out', 0))


def layer(**options):
  if options.get('qk_norm', 'none') != 'none':
    options['qk_norm_epsilon'] = EPSILON
  return Attention(AttentionOptions(H, N, D, **options))


@pytest.mark.parametrize(
  ('options', 'biased'),
  [
    (dict(qk_norm='head'), ()),
    (dict(qk_norm='all', clip=0.7), ()),
    (dict(clip=0.5, biases='query, key, value'), ('query', 'key', 'value')),
    (dict(qk_norm='head', biases='all'), ('query', 'key', 'value', 'out')),
  ],
)
def test_equals_its_definition(options, biased):
  x, segment_ids, positions = inputs()
  p = kernels() | draw(SCALES[options.get('qk_norm', 'none')], seed=3)
  p |= {f'b_{name}': biases()[f'b_{name}'] for name in biased}
  module = layer(**options)
  initial = jax.eval_shape(module.init, jax.random.key(0), *inputs())
  initial = nn.meta.unbox(initial)['params']
  assert {k: v.shape for k, v in initial.items()} == {
    k: v.shape for k, v in p.items()
  }
  y = jax.jit(module.apply)({'params': p}, x, segment_ids, positions)
  expected = defined_output(p, x, segment_ids, options.get('clip', 0.0))
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_biases_follow_the_model_unless_they_are_named():
  default, none = AttentionOptions(), AttentionOptions(biases='none')
  partial = AttentionOptions(biases='query,out')
  assert default.has_bias('key', True) and not default.has_bias('key', False)
  assert not none.has_bias('out', True)
  assert [partial.has_bias(name, True) for name in ('query', 'key', 'out')] == [
    True,
    False,
    True,
  ]
  with pytest.raises(ValueError, match="biases='q' must be one of"):
    AttentionOptions(biases='q')


def test_scales_are_those_of_norms_and_one_that_is_not_read_is_refused():
  boxed = jax.eval_shape(
    layer(qk_norm='head').init, jax.random.key(0), *inputs()
  )
  assert roles_of(boxed['params'])['query_norm'] == ('norm', 'scale')
  with pytest.raises(ValueError, match=r'fixed_scale=0\.1 has no effect'):
    AttentionOptions(fixed_scale=0.1)


@pytest.mark.parametrize(
  'qk_norm', ['all', pytest.param('head', marks=pytest.mark.slow)]
)
def test_keys_of_an_encoder_are_normed_as_the_layers_own(qk_norm):
  options = AttentionOptions(
    H, N, D, qk_norm=qk_norm, clip=0.6, qk_norm_epsilon=EPSILON
  )
  p = kernels() | draw(SCALES[qk_norm], seed=3)
  x = inputs()[0]
  key, value = project_memory(Shared(), options, p, x)
  y = normed(
    np.einsum('btm,mhd->bthd', x, p['w_key']), np.asarray(p['key_norm'])
  )
  np.testing.assert_allclose(
    key, np.clip(y, -0.6, 0.6).swapaxes(1, 2), rtol=1e-4, atol=1e-5
  )
  y = np.einsum('btm,mhd->bhtd', x, p['w_value'])
  np.testing.assert_allclose(value, np.clip(y, -0.6, 0.6), atol=1e-5)


@pytest.mark.parametrize(
  'qk_norm', ['all', pytest.param('head', marks=pytest.mark.slow)]
)
def test_heads_on_several_devices_change_nothing(qk_norm):
  x, segment_ids, positions = inputs()
  p = kernels() | draw(SCALES[qk_norm], seed=3)
  module = layer(qk_norm=qk_norm)

  def loss(p, x):
    y = module.apply({'params': p}, x, segment_ids, positions)
    return (y**2).sum(), y

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  expected = run(p, x)
  mesh = make_mesh(dict(tensor=2), jax.devices()[:2])

  def shard(name, leaf):
    # Heads are the last but one dimension, in w_out the first.
    spec = ['tensor' if size in (H, N) else None for size in leaf.shape]
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

  x = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
  split = {name: shard(name, leaf) for name, leaf in p.items()}
  result = run(split, x)
  assert split['w_query'].sharding.spec[1] == 'tensor'
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    result,
    expected,
  )
