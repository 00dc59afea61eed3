"""Multi-head latent attention by its definition.

That its cache gives the same is in `tests/models/test_decoding.py`.
"""

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import models
from moe_jax.layers import (
  LatentAttention,
  LatentOptions,
  Numerics,
  Rotary,
  Shared,
  Yarn,
)
from moe_jax.layers.parameters import roles_of
from moe_jax.models import lora
from tests.layers.attention.test_attention import defined_mask, draw, inputs
from tests.models import tiny

B, T, M, H = 3, 7, 10, 4
Q, R, PLAIN, ROTARY, VALUE = 9, 5, 3, 2, 6
EPSILON = 0.02
YARN = Yarn(factor=8.0, original_len=4, mscale=1.0, mscale_all_dim=0.5)
POSITIONS = Rotary(10.0, interleaved=True, scaling=YARN)


def options(query_rank=Q, **changes):
  widths = dict(plain_width=PLAIN, rotary_width=ROTARY, value_width=VALUE)
  sizes = dict(kv_rank=R, norm_epsilon=EPSILON, **widths)
  return LatentOptions(H, query_rank=query_rank, **sizes | changes)


def layer(query_rank=Q, dtype='float32', **changes):
  return LatentAttention(
    options(query_rank, **changes), Shared(Numerics(dtype)), POSITIONS
  )


def kernels(query_rank=Q):
  shapes = {
    'w_kv_down': (M, R + ROTARY),
    'kv_norm': (R,),
    'w_kv_up': (R, H, PLAIN + VALUE),
    'w_out': (H, VALUE, M),
  }
  if query_rank:
    shapes |= {
      'w_query_down': (M, query_rank),
      'query_norm': (query_rank,),
      'w_query_up': (query_rank, H, PLAIN + ROTARY),
    }
  else:
    shapes['w_query'] = (M, H, PLAIN + ROTARY)
  return jax.tree.map(lambda x: 2 * x, draw(shapes))


def normed(x, scale):
  return scale * x / np.sqrt(np.mean(x**2) + EPSILON)


def output_by_loops(p, x, segment_ids, positions):
  """The output token by token and head by head, in float64.

  The one pair of two numbers turns by 1 radian a position at first. In 4 tokens
  a pair turns 32 times, and once, at places ln(4 / (64 pi)) / ln(10) = -1.7 and
  ln(4 / (2 pi)) / ln(10) = -0.2 among pairs: rounded, -2 and 0, and no pair is
  before 0. So pair 0 turns as fast as at first, and with m(s) = 0.1 s ln(8) + 1
  queries and keys grow by m(1) / m(0.5), and scores by m(0.5)^2 as well.
  """
  p = {name: np.asarray(leaf, np.float64) for name, leaf in p.items()}
  grown = 0.05 * np.log(8) + 1
  factor = (0.1 * np.log(8) + 1) / grown

  def rotated(y, position):
    pairs = y[0::2] + 1j * y[1::2]
    pairs = pairs * factor * np.exp(1j * position)
    return np.stack([pairs.real, pairs.imag], -1).ravel()

  scale = (PLAIN + ROTARY) ** -0.5 * grown**2
  mask = np.asarray(defined_mask(segment_ids))[:, 0]
  y = np.zeros((B, T, M))
  for b in range(B):
    short = x[b] @ p['w_kv_down'] + p.get('b_kv_down', 0)
    vectors = [normed(row, p['kv_norm']) for row in short[:, :R]]
    shared = [
      rotated(row, positions[b, t]) for t, row in enumerate(short[:, R:])
    ]
    for t, h in np.ndindex(T, H):
      if 'w_query' in p:
        query = x[b, t] @ p['w_query'][:, h]
      else:
        vector = x[b, t] @ p['w_query_down'] + p.get('b_query_down', 0)
        vector = normed(vector, p['query_norm'])
        query = vector @ p['w_query_up'][:, h]
      query = np.append(query[:PLAIN], rotated(query[PLAIN:], positions[b, t]))
      up, scores, values = p['w_kv_up'][:, h], [], []
      for s in np.flatnonzero(mask[b, t]):
        expanded = vectors[s] @ up
        key = np.append(expanded[:PLAIN], shared[s])
        scores.append(scale * query @ key)
        values.append(expanded[PLAIN:])
      weights = np.exp(scores - np.max(scores))
      mean = weights @ np.array(values) / weights.sum()
      y[b, t] += mean @ p['w_out'][h]
  return y + p.get('b_out', 0)


@pytest.mark.parametrize(('query_rank', 'biases'), [(0, 'none'), (Q, 'all')])
def test_equals_its_definition(query_rank, biases):
  x, segment_ids, positions = inputs()
  module, p = layer(query_rank, biases=biases), kernels(query_rank)
  if biases == 'all':
    shapes = {'b_query_down': (Q,), 'b_kv_down': (R + ROTARY,), 'b_out': (M,)}
    p |= draw(shapes, seed=2)
  boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs())['params']
  assert roles_of(boxed)['kv_norm'] == ('norm', 'scale')
  assert roles_of(boxed)['w_kv_up'] == ('attention', 'kernel')
  shapes = {k: v.shape for k, v in nn.meta.unbox(boxed).items()}
  assert shapes == {k: v.shape for k, v in p.items()}
  y = jax.jit(module.apply)({'params': p}, x, segment_ids, positions)
  expected = output_by_loops(p, np.asarray(x), segment_ids, positions)
  assert np.std(expected) > 0.5
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_implementations_agree_in_value_and_gradient():
  x, segment_ids, positions = inputs()

  def program(name):
    module = layer(implementation=name)

    def loss(p):
      y = module.apply({'params': p}, x, segment_ids, positions)
      return (y**2).sum()

    return jax.jit(jax.value_and_grad(loss))

  result, expected = (program(name)(kernels()) for name in ('blocks', 'einsum'))
  tiny.assert_trees_close(result[1], expected[1], rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(result[0], expected[0], rtol=1e-5)


def test_few_queries_meet_the_cache_as_it_is():
  # Each query costs 2 (5 + 2) - (3 + 2 + 6) = 3 products more a head and slot,
  # and expanding a slot 5 (3 + 6) = 45.
  assert options().cached_shapes == ((1, R + ROTARY), (1, 0))
  assert options().absorbs(15)
  assert not options().absorbs(16)
  # DeepSeek-V2's prompts of 158 tokens and more are expanded.
  published = LatentOptions(128)
  assert published.absorbs(157) and not published.absorbs(158)


def test_adapters_find_the_inputs_of_all_kernels():
  model = tiny.build(attention=options())
  adapters = lora.adapt(
    lora.LoraOptions(rank=2, parts='attention'), models.describe(model)
  )
  inputs_of = {path[-1]: k.inputs for path, k in adapters.kernels.items()}
  names = ('w_query_down', 'w_query_up', 'w_kv_down', 'w_kv_up')
  assert inputs_of == dict.fromkeys(names, 1) | {'w_out': 2}
