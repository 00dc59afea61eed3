"""Every implementation of attention equals a loop over queries, or refuses.

`attend` by einsum is judged by numpy, the others by einsum, in value and
gradient. What a layer makes of queries and keys is in `test_attention.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.layers import Attention, AttentionOptions, Numerics, Rotary, Shared
from moe_jax.layers.attention.blockwise import blocks_of
from moe_jax.layers.attention.dot_product import IMPLEMENTATIONS, attend
from moe_jax.layers.attention.keys import Keys, masked_softmax
from moe_jax.partitioning import make_mesh
from tests.models.tiny import assert_trees_close

B, H, N, D = 2, 6, 2, 5
OTHERS = [n for n in IMPLEMENTATIONS if n not in ('auto', 'einsum')]
GPU = jax.default_backend() == 'gpu'
TPU_KERNEL = 'tpu_custom_call'
# (T, S, keys, what else there is). The last of three blocks of 150 queries is
# smaller, and a window of 37 leaves keys out on both sides; splash serves
# multiples of 128 alone.
CASES = {
  'a learned bias': (150, 150, Keys(), 'ids bias'),
  'a window': (150, 150, Keys(window=37, scale=1.0), ''),
  'sinks in a window': (150, 150, Keys(window=40), 'ids sinks'),
  'a memory': (70, 90, Keys(causal=False, cross=True), 'ids key_ids bias'),
  'a memory of one segment': (70, 50, Keys(causal=False, cross=True), 'ids'),
  'one token': (1, 1, Keys(), 'ids'),
  'packed': (7, 7, Keys(), 'ids'),
  'both ways': (7, 7, Keys(causal=False), ''),
  'a kernel': (128, 128, Keys(), 'ids sinks'),
  'a kernel both ways': (128, 128, Keys(causal=False), ''),
  'a kernel with a window': (128, 128, Keys(window=37), 'ids'),
}


def segments(length, seed):
  """Two documents and, in the second row, padding at the end."""
  rng = np.random.default_rng(seed)
  ids = np.sort(rng.integers(1, 3, (B, length)), axis=1)
  ids[1, length - length // 4 :] = 0
  return jnp.asarray(ids, jnp.int32)


def draw(*shape, seed=0, dtype='float32'):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def arrays(T, S, has='', D=D, dtype='float32'):
  """Queries, keys, values, and what else `has` names."""
  shapes = (B, T, H, D), (B, S, N, D), (B, S, N, D)
  rows = [draw(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
  made = dict(
    ids=lambda: segments(T, 2),
    # Some queries see no key at all, as their document has none.
    key_ids=lambda: segments(S, 3).at[0].set(1),
    bias=lambda: draw(H, T, S, seed=4),
    sinks=lambda: draw(H, seed=5),
  )
  return rows, {name: made[name]() for name in has.split()}


def call(implementation, rows, extra, keys=Keys()):
  others = {k: v for k, v in extra.items() if k in ('bias', 'sinks')}
  return attend(
    *rows,
    extra.get('ids'),
    key_segment_ids=extra.get('key_ids'),
    keys=keys,
    implementation=implementation,
    **others,
  )


@functools.cache
def program(implementation, keys):
  """Compiled: (rows, extra) -> ((gradients of rows, of extra), y)."""

  def loss(floats, ids):
    rows, extra = floats
    y = call(implementation, rows, extra | ids, keys)
    toward = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return (y.astype(jnp.float32) * toward).sum(), y

  run = jax.jit(jax.grad(loss, has_aux=True))

  def with_ids(rows, extra):
    ids = {k: v for k, v in extra.items() if k.endswith('ids')}
    return run((rows, {k: extra[k] for k in extra.keys() - ids.keys()}), ids)

  return with_ids


@pytest.mark.parametrize('name', [n for n in CASES if 'kernel' not in n])
def test_einsum_is_a_loop_over_queries(name):
  T, S, keys, has = CASES[name]
  rows, extra = arrays(T, S, has)
  y = np.asarray(call('einsum', rows, extra, keys))
  query, key, value = (np.asarray(x, np.float64) for x in rows)
  ids = np.asarray(extra.get('ids', jnp.ones((B, T))))
  key_ids = np.asarray(extra.get('key_ids', ids))
  for b, t, h in np.ndindex(B, T, H):
    s = np.arange(S)
    seen = np.ones(S, bool)
    if 'key_ids' in extra or not keys.cross:
      seen = key_ids[b] == ids[b, t]
    if keys.causal:
      seen &= s <= t
    if keys.window:
      seen &= s > t - keys.window
    scores = key[b, :, h // (H // N)] @ query[b, t, h]
    scores = scores * (keys.scale or D**-0.5)
    if 'bias' in extra:
      scores = scores + np.asarray(extra['bias'])[h, t]
    # A query without a key has the mean of all values: padding may be routed
    # and take slots from others, so that its output counts.
    weights = np.exp(scores) * seen if seen.any() else np.ones(S)
    total = weights.sum()
    if 'sinks' in extra:
      total += np.exp(float(extra['sinks'][h]))
    expected = weights @ value[b, :, h // (H // N)] / total
    np.testing.assert_allclose(y[b, t, h], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize('implementation', OTHERS)
def test_implementations_equal_einsum_in_value_and_gradient(implementation):
  if implementation == 'cudnn' and not GPU:
    pytest.skip('needs an NVIDIA GPU')
  half = implementation == 'cudnn'
  dtype, width, tolerance = (
    ('bfloat16', 8, 0.05) if half else ('float32', D, 2e-4)
  )
  served = 0
  for name, (T, S, keys, has) in CASES.items():
    if implementation == 'xla' and 'key_ids' in has:
      continue  # its gradient of a query that sees no key is zero
    rows, extra = arrays(T, S, has, width, dtype)
    try:
      result = program(implementation, keys)(rows, extra)
    except ValueError as error:
      # Only the function's own refusal means that a case is not served.
      assert str(error).startswith(f"attention='{implementation}'")
      continue
    served += 1
    expected = program('einsum', keys)(rows, extra)
    for a, b in zip(*map(jax.tree.leaves, (result, expected)), strict=True):
      np.testing.assert_allclose(
        np.float32(a), np.float32(b), tolerance, tolerance, err_msg=name
      )
  assert served >= 3


@pytest.mark.parametrize('implementation', ['blocks', 'splash'])
def test_half_precision_is_close(implementation):
  rows, extra = arrays(128, 128, 'ids', dtype='bfloat16')
  y = call(implementation, rows, extra)
  assert y.dtype == jnp.bfloat16
  exact = call('einsum', [x.astype(jnp.float32) for x in rows], extra)
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize(
  'implementation', ['blocks', pytest.param('splash', marks=pytest.mark.slow)]
)
def test_rows_and_heads_on_several_devices_change_nothing(implementation):
  rows, extra = arrays(128, 128, 'ids sinks')
  expected = program('einsum', Keys())(rows, extra)
  mesh = make_mesh(dict(data=2, tensor=2), jax.devices()[:4])

  def split(leaf, *spec):
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

  rows = [split(leaf, 'data', None, 'tensor') for leaf in rows]
  extra = {
    'ids': split(extra['ids'], 'data'), 'sinks': split(extra['sinks'], 'tensor')
  }  # fmt: skip
  result = program(implementation, Keys())(rows, extra)
  assert_trees_close(result, expected, rtol=1e-3, atol=1e-4)


def test_hidden_keys_are_left_out():
  bounds = [tuple(b) for b in blocks_of(150, 150, Keys())]
  assert bounds == [(0, 64, 0, 64), (64, 128, 0, 128), (128, 150, 0, 150)]
  # Query 64 is the first of its block; with 20 keys it sees 45 to 64.
  bounds = [tuple(b) for b in blocks_of(150, 150, Keys(window=20))]
  assert bounds[1] == (64, 128, 32, 128)
  # A long row has few blocks, as each is compiled.
  assert len(blocks_of(4096, 4096, Keys())) == 8


def test_a_cpu_chooses_blocks_and_only_einsum_keeps_scores():
  """No array of all scores is left, not even where two layers are a loop.

  The choice by platform returns what each implementation keeps, as zeros.
  """
  T = 130
  (q, k, v), _ = arrays(T, T)

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


def test_weights_by_hand():
  # Scores are ln 1 and ln 3, and the third key is hidden, however high its
  # score; beside them may stand a sink of ln 4.
  scores = jnp.array([[[[0.0, np.log(3.0), 1e30]]]])
  mask = jnp.array([[[[True, True, False]]]])
  weights = masked_softmax(scores, mask)
  np.testing.assert_allclose(weights[0, 0, 0], [1 / 4, 3 / 4, 0], rtol=1e-6)
  assert weights[0, 0, 0, 2] == 0
  sinks = jnp.log(jnp.array([4.0])).reshape(1, 1, 1, 1)
  weights = masked_softmax(scores, mask, sinks)
  np.testing.assert_allclose(weights[0, 0, 0], [1 / 8, 3 / 8, 0], rtol=1e-6)


def layer(implementation, dtype='float32', seq_len=128, sinks=False, **changes):
  """A layer, and what it is called with."""
  options = AttentionOptions(
    4, N, D + 1, implementation=implementation, sinks=sinks
  )
  module = Attention(options, Shared(Numerics(dtype)), Rotary(), **changes)
  positions = np.tile(np.arange(seq_len, dtype=np.int32), (4, 1))
  x = np.ones((4, seq_len, 10), np.float32)
  return module, (x, np.ones_like(positions), positions)


def params_of(module, *args):
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  shapes = nn.meta.unbox(shapes)
  return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)


def lowered(implementation, platform='tpu', sizes=None, train=True, **changes):
  """Text of a layer's program, lowered for a platform that need not exist."""
  bias = changes.pop('bias', None)
  module, args = layer(implementation, **changes)
  params = params_of(module, *args)
  mesh = make_mesh(sizes or {}, jax.devices()[: 4 if sizes else 1])

  def abstract(a):
    sharding = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

  rngs = {'dropout': jax.random.key(0)}
  run = jax.jit(
    lambda *a: module.apply(params, *a, bias, train=train, rngs=rngs)
  )
  trace = run.trace(*jax.tree.map(abstract, args))
  return trace.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('sizes', [None, dict(data=4), dict(fsdp=2, tensor=2)])
def test_auto_is_the_kernel_on_a_tpu_and_plain_elsewhere(sizes):
  assert TPU_KERNEL in lowered('auto', 'tpu', sizes)
  assert TPU_KERNEL not in lowered('auto', 'cpu', sizes)


def test_auto_is_plain_where_the_kernel_cannot_serve():
  assert TPU_KERNEL not in lowered('auto', seq_len=127)
  assert TPU_KERNEL not in lowered('einsum')
  assert TPU_KERNEL not in lowered('auto', bias=jnp.zeros((4, 128, 128)))
  assert TPU_KERNEL not in lowered('auto', dropout=0.5)
  assert TPU_KERNEL in lowered('auto', dropout=0.5, train=False)


# An implementation must refuse what it would otherwise leave out silently.
NO_BIAS = 'splash.*no relative'
REFUSED = {
  'xla.*has no dropout': ('xla', dict(dropout=0.1)),
  'xla.*no attention sinks': ('xla', dict(sinks=True)),
  'splash.*has no dropout': ('splash', dict(dropout=0.1)),
  NO_BIAS: ('splash', {}),
  'seq_len=127 is no multiple of 128': ('splash', dict(seq_len=127)),
  'blocks.*has no dropout': ('blocks', dict(dropout=0.1)),
  "dtype='float32' is none of": ('cudnn', {}),
  'head_width=6 is no multiple of 8': ('cudnn', dict(dtype='bfloat16')),
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_served_is_refused_when_parameters_are_made(message):
  implementation, changes = REFUSED[message]
  bias = jnp.zeros((4, 128, 128)) if message == NO_BIAS else None
  module, args = layer(implementation, **changes)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), *args, bias)


def test_the_backward_pass_keeps_the_weights_and_no_mask():
  module, args = layer('einsum', seq_len=7)
  args = [*map(jnp.asarray, args)]
  params = params_of(module, *args)

  def run(x):
    return module.apply(params, x, *args[1:])

  residuals = jax.tree.leaves(
    jax.eval_shape(lambda x: jax.vjp(run, x)[1], args[0])
  )
  square = [leaf for leaf in residuals if leaf.shape[-2:] == (7, 7)]
  assert square
  for leaf in square:
    assert (leaf.dtype, leaf.size) == (jnp.float32, 4 * 4 * 7 * 7)
