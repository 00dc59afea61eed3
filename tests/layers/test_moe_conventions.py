"""Rarely used options: bias, one group for the batch, masked outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.layers import FeedForwardExpert, MoE, MoeOptions
from moe_jax.layers.routers import TokenChoice
from moe_jax.routing.capacity import All, Fixed
from tests.models import tiny

B, T, E, M, F = 3, 50, 5, 6, 11


def draw(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32)


def make(capacity=All(), **options):
  expert = FeedForwardExpert(F, 'relu')
  return MoE(MoeOptions(E, capacity=capacity, expert=expert, **options))


@functools.cache
def params_of(layer):
  shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((B, T, M)))
  leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes)['params'])
  return tree.unflatten(
    [draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
  )


@functools.partial(jax.jit, static_argnames=('layer', 'train'))
def apply(layer, params, x, train, rngs):
  return layer.apply({'params': params}, x, train=train, rngs=rngs)


def run(layer, x, params=None, train=False, rngs=None):
  return apply(layer, params or params_of(layer), x, train, rngs)


def test_a_bias_moves_tokens_to_its_expert():
  plain, biased = make(), make(router=TokenChoice(use_bias=True))
  params = params_of(plain)
  b = np.zeros(E, np.float32)
  b[3] = 100.0
  with_bias = {**params, 'router': {'w': params['router']['w'], 'b': b}}
  _, aux = run(biased, draw(B, T, M), params=with_bias)
  np.testing.assert_array_equal(aux.stats.load, [0, 0, 0, B * T, 0])
  none = {**params, 'router': {'w': params['router']['w'], 'b': 0 * b}}
  y, _ = run(biased, draw(B, T, M), params=none)
  np.testing.assert_array_equal(y, run(plain, draw(B, T, M))[0])


def test_the_whole_batch_can_be_one_group():
  # All tokens choose one expert with five slots: it serves the first
  # five of the batch.
  layer = make(Fixed(slots=5), group_size=-1)
  x = np.broadcast_to(draw(M)[None, None], (B, T, M))
  served = np.abs(np.asarray(run(layer, x)[0])).max(-1) > 0
  np.testing.assert_array_equal(served.reshape(-1), np.arange(B * T) < 5)


def test_outputs_are_masked_in_training_and_scaled_in_evaluation():
  rate = 0.25
  plain, masked = make(), make(output_masking=rate)
  x = draw(B, T, M)
  clean = np.asarray(run(plain, x)[0])
  scaled = np.asarray(run(masked, x)[0])
  np.testing.assert_allclose(scaled, 0.75 * clean, rtol=1e-5, atol=1e-6)
  rngs = {'router': tiny.key(1)}
  trained = np.asarray(run(masked, x, train=True, rngs=rngs)[0])
  zero = np.abs(trained).max(-1) == 0
  np.testing.assert_allclose(trained[~zero], clean[~zero], rtol=1e-5, atol=1e-6)
  # With 150 draws four standard deviations are 0.14.
  assert abs(zero.mean() - rate) < 0.14
