"""Every implementation of attention equals the plain one, or refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.layers import Attention, AttentionOptions, Numerics, Rotary, Shared
from moe_jax.layers.attention.dot_product import attend
from moe_jax.layers.attention.keys import Keys, masked_softmax, visible
from moe_jax.partitioning import make_mesh
from tests.models import tiny

B, T, M, H, N, D = 4, 128, 10, 4, 2, 6  # splash allows no smaller T
GPU = jax.default_backend() == 'gpu'
TPU_KERNEL = 'tpu_custom_call'


def batch(seq_len=T, seed=0):
  """Packed rows, a row of one document, and padding at the end."""
  x = np.random.default_rng(seed).normal(size=(B, seq_len, M))
  segment_ids = np.ones((B, seq_len), np.int32)
  segment_ids[0, seq_len // 3 :] = 2
  segment_ids[1, seq_len // 2 :] = 2
  segment_ids[1, -seq_len // 5 :] = 0
  segment_ids[2, 1:] = 0
  positions = np.tile(np.arange(seq_len, dtype=np.int32), (B, 1))
  x = x.astype(np.float32)
  return tuple(map(jnp.asarray, (x, segment_ids, positions)))


def kernels(seed=1):
  rng = np.random.default_rng(seed)
  shapes = {
    'w_query': (M, H, D),
    'w_key': (M, N, D),
    'w_value': (M, N, D),
    'w_out': (H, D, M),
  }
  return {
    name: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32)
    for name, shape in shapes.items()
  }


def layer(implementation='einsum', dtype='float32', **attributes):
  options = AttentionOptions(H, N, D, implementation=implementation)
  shared = Shared(Numerics(dtype))
  return Attention(options, shared, Rotary(), **attributes)


@functools.cache
def program(implementation, causal, seq_len):
  """A compiled function (kernels, x, segment_ids) -> ((loss, y), gradients)."""
  positions = batch(seq_len)[2]
  toward = np.random.default_rng(2).normal(size=(B, seq_len, M))
  module = layer(implementation, causal=causal)

  def loss(params, x, segment_ids):
    y = module.apply({'params': params}, x, segment_ids, positions)
    return (y * toward.astype(np.float32)).sum(), y

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize(
  ('implementation', 'seq_len', 'causal', 'packed'),
  [
    ('xla', 7, True, True),
    ('xla', 7, False, False),
    ('splash', T, True, True),
    ('splash', T, False, False),
    ('blocks', 7, True, True),
  ],
)
def test_equals_einsum_in_value_and_gradient(
  implementation, seq_len, causal, packed
):
  x, segment_ids, _ = batch(seq_len)
  args = (kernels(), x, segment_ids if packed else None)
  results = program(implementation, causal, seq_len)(*args)
  expected = program('einsum', causal, seq_len)(*args)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    results,
    expected,
  )
  for name, leaf in tiny.leaves(expected[1]).items():
    assert np.abs(leaf).max() > 0.1, name


@pytest.mark.parametrize(
  ('implementation', 'seq_len'),
  [('blocks', 7), ('einsum', 7), ('xla', 7), ('splash', T)],
)
def test_padding_sees_no_token_and_none_sees_it(implementation, seq_len):
  x, segment_ids, _ = batch(seq_len)
  padding = np.asarray(segment_ids) == 0
  other = jnp.where(padding[..., None], 1e3, x)
  run = program(implementation, True, seq_len)
  (_, y), (_, dx) = run(kernels(), x, segment_ids)
  (_, changed), (_, changed_dx) = run(kernels(), other, segment_ids)
  for a, b in ((y, changed), (dx, changed_dx)):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_array_equal(a[~padding], b[~padding])
    assert np.isfinite(b).all()


def test_bfloat16_splash_is_close_to_float32():
  rng = np.random.default_rng(0)
  query, key, value = (
    jnp.asarray(rng.normal(size=(B, T, heads, D)), jnp.bfloat16)
    for heads in (H, N, N)
  )
  segment_ids = batch()[1]
  y = jax.jit(functools.partial(attend, implementation='splash'))(
    query, key, value, segment_ids
  )
  assert y.dtype == jnp.bfloat16
  exact = jax.jit(functools.partial(attend, implementation='einsum'))(
    *(a.astype(jnp.float32) for a in (query, key, value)), segment_ids
  )
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03)


def test_a_mesh_changes_nothing():
  x, segment_ids, _ = batch()
  args = (kernels(), x, segment_ids)
  expected = program('einsum', True, T)(*args)
  mesh = make_mesh(dict(data=2, expert=2, tensor=2))
  rows = NamedSharding(mesh, PartitionSpec(('data', 'expert')))
  replicated = NamedSharding(mesh, PartitionSpec())
  args = jax.device_put(args, (replicated, rows, rows))
  results = program('splash', True, T)(*args)
  tiny.assert_trees_close(results[1], expected[1], rtol=1e-4, atol=1e-4)


def lowered(implementation, platform, sizes=None, seq_len=T, **options):
  """Text of a layer's program, lowered for a platform that need not exist."""
  mesh = make_mesh(sizes or {}, jax.devices()[: 4 if sizes else 1])

  def abstract(a):
    sharding = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

  module = layer(implementation, **options)
  run = jax.jit(
    lambda x, *rest: module.apply({'params': kernels()}, x, *rest, train=True)
  )
  args = jax.tree.map(abstract, batch(seq_len))
  return run.trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('sizes', [None, dict(data=4), dict(fsdp=2, tensor=2)])
def test_auto_is_the_kernel_on_a_tpu_and_plain_elsewhere(sizes):
  assert TPU_KERNEL in lowered('auto', 'tpu', sizes)
  assert TPU_KERNEL not in lowered('auto', 'cpu', sizes)


def test_auto_is_plain_where_the_kernel_cannot_serve():
  assert TPU_KERNEL not in lowered('auto', 'tpu', seq_len=T - 1)
  assert TPU_KERNEL not in lowered('einsum', 'tpu')
  bias = jnp.zeros((H, T, T))
  args = batch()
  run = jax.jit(lambda *a: layer('auto').apply({'params': kernels()}, *a, bias))
  text = run.trace(*args).lower(lowering_platforms=('tpu',)).as_text()
  assert TPU_KERNEL not in text


def test_auto_with_dropout_is_plain_in_training_alone():
  x, segment_ids, positions = batch()
  module = layer('auto', dropout=0.5)

  def text(train):
    run = jax.jit(
      lambda key: module.apply(
        {'params': kernels()},
        x,
        segment_ids,
        positions,
        train=train,
        rngs={'dropout': key},
      )
    )
    trace = run.trace(jax.random.key(0))
    return trace.lower(lowering_platforms=('tpu',)).as_text()

  assert TPU_KERNEL not in text(train=True)
  assert TPU_KERNEL in text(train=False)


REFUSED = {
  "attention='xla': it has no dropout": dict(implementation='xla', dropout=0.1),
  "attention='splash': it has no dropout": dict(
    implementation='splash', dropout=0.1
  ),
  "attention='cudnn': dtype='float32' is none of": dict(implementation='cudnn'),
  "attention='cudnn': head_width=6 is no multiple of 8": dict(
    implementation='cudnn', dtype='bfloat16'
  ),
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_served_is_refused_when_parameters_are_made(message):
  module = layer(**REFUSED[message])
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), *batch())


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match="unknown implementation 'flash'"):
    AttentionOptions(implementation='flash')


def test_a_length_that_cannot_be_served_is_refused_when_parameters_are_made():
  args = batch(T - 1)
  with pytest.raises(ValueError, match='seq_len=127 is no multiple of 128'):
    jax.eval_shape(layer('splash').init, jax.random.key(0), *args)


def test_a_bias_that_cannot_be_served_is_refused_when_parameters_are_made():
  args = (*batch(), jnp.zeros((H, T, T)))
  with pytest.raises(ValueError, match="'splash': it has no relative"):
    jax.eval_shape(layer('splash').init, jax.random.key(0), *args)


@pytest.mark.skipif(GPU, reason='there is a GPU')
def test_cudnn_without_a_gpu_is_refused():
  with pytest.raises(ValueError, match='needs an NVIDIA GPU'):
    x = jnp.ones((B, T, H, 8), jnp.bfloat16)
    attend(x, x, x, None, implementation='cudnn')


@pytest.mark.skipif(not GPU, reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('packed', [True, False])
def test_cudnn_equals_einsum(packed):
  segment_ids = batch()[1] if packed else None
  rng = np.random.default_rng(0)
  args = [
    jnp.asarray(rng.normal(size=(B, T, heads, 8)), jnp.bfloat16)
    for heads in (H, N, N)
  ]

  def run(name):
    def loss(*args):
      y = attend(*args, segment_ids, implementation=name)
      return y.astype(jnp.float32).sum(), y

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)

  tiny.assert_trees_close(run('cudnn'), run('einsum'), rtol=0.05, atol=0.05)


def test_who_sees_whom():
  # The row has two tokens of document 1, two of document 2 and one of padding.
  both_ways = [
    [1, 1, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 0, 0, 1],
  ]
  segment_ids = jnp.array([[1, 1, 2, 2, 0]])

  def visible_to(ids, **keys):
    return np.asarray(visible(ids, ids, (5, 5), Keys(**keys)))

  mask = visible_to(segment_ids, causal=False)
  np.testing.assert_array_equal(mask, np.array([both_ways], bool))
  mask = visible_to(segment_ids)
  np.testing.assert_array_equal(mask, np.tril(np.array([both_ways], bool)))
  one_document = visible_to(None)
  np.testing.assert_array_equal(one_document, np.tri(5, dtype=bool)[None])
  assert visible_to(None, causal=False).all()
  # A window of three tokens has the query's own and the two before it.
  in_window = np.tri(5, dtype=bool) & ~np.tri(5, k=-3, dtype=bool)
  np.testing.assert_array_equal(visible_to(None, window=3), in_window[None])


def test_masked_softmax_gives_hidden_keys_exactly_nothing():
  scores = np.log(np.array([[[1, 3, 96], [1, 3, 4]]], np.float32))
  mask = jnp.array([[[True, True, False], [True, True, True]]])
  expected = [[[0.25, 0.75, 0], [0.125, 0.375, 0.5]]]
  weights = np.asarray(jax.jit(masked_softmax)(scores, mask))
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  assert weights[0, 0, 2] == 0
  scores[0, 0, 2] = 1e30  # a masked score must not matter
  probs = np.asarray(jax.jit(masked_softmax)(scores, mask))
  np.testing.assert_array_equal(probs, weights)


def test_the_backward_pass_keeps_the_weights_and_no_mask():
  x, segment_ids, positions = batch(7)

  def run(x):
    return layer().apply({'params': kernels()}, x, segment_ids, positions)

  residuals = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(run, x)[1], x))
  square = [leaf for leaf in residuals if leaf.shape[-2:] == (7, 7)]
  assert square
  for leaf in square:
    assert (leaf.dtype, leaf.size) == (jnp.float32, B * H * 7 * 7)
