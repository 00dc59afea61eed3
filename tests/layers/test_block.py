"""A block uses its context beside the residual stream."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers import AttentionOptions, FfnOptions, MoeOptions
from moe_jax.layers.block import Block, BlockConfig, Context
from moe_jax.routing.capacity import Fixed
from tests.models.tiny import draw, layer_params

B, T, E, M, F = 3, 4, 5, 6, 11
IDS = np.array([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 2, 2]], np.int32)


def make(sparse=True, **moe):
  moe = MoeOptions(E, capacity=Fixed(slots=2), **moe)
  config = BlockConfig(
    AttentionOptions(num_heads=2),
    FfnOptions(F, 'relu'),
    moe.within(FfnOptions(F, 'relu'), 0.0),
  )
  return Block(config, sparse)


def context(**changes):
  ids = jnp.asarray(IDS)
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
  return Context(ids, ids > 0, positions)._replace(**changes)


def params_of(block, x):
  return layer_params(block, x, context(), None, 0)


@functools.cache
def compiled(block):
  return jax.jit(lambda p, x, c: block.apply({'params': p}, x, c, None, 0))


def run(block, params, x, context):
  y, _, aux = compiled(block)(params, x, context)
  return np.asarray(y), aux


def test_padding_takes_slots_only_if_the_context_says_that_it_is_routed():
  # All tokens are alike and choose one expert with two slots; the first token
  # of the first row is padding.
  block = make()
  x = jnp.broadcast_to(jnp.asarray(draw(M))[None, None], (B, T, M))
  params = params_of(block, x)
  for name in ('w_query', 'w_key', 'w_value', 'w_out'):
    params['attention'][name] *= 0
  served = []
  for mask, tokens in ((None, B * T - 1), (jnp.ones((B, T), bool), B * T)):
    y, aux = run(block, params, x, context(routed_mask=mask))
    assert aux.stats.tokens == tokens
    served.append(np.abs(y - np.asarray(x)).max(-1)[0] > 1e-3)
  np.testing.assert_array_equal(served[0], [False, True, True, False])
  np.testing.assert_array_equal(served[1], [True, True, False, False])


def test_who_sees_and_who_is_seen_may_be_told_apart():
  # Padding attends to the first example of its row, and no token attends to
  # padding.
  block, x = make(sparse=False), jnp.asarray(draw(B, T, M, seed=9))
  params = params_of(block, x)
  ids = jnp.asarray(IDS[:, ::-1])  # padding at the end
  plain = context(segment_ids=ids)
  apart = plain._replace(segment_ids=jnp.maximum(ids, 1), key_segment_ids=ids)
  y, _ = run(block, params, x, plain)
  other, _ = run(block, params, x, apart)
  differs = np.abs(y - other).max(-1) > 1e-5
  np.testing.assert_array_equal(differs, np.asarray(ids) == 0)
  # The values of padding do not change the other tokens.
  changed = x.at[0, 3].add(1.0)
  changed_output, _ = run(block, params, changed, apart)
  np.testing.assert_array_equal(changed_output[0, :3], other[0, :3])
