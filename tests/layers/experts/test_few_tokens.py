"""Experts in a decoding step equal the stacked experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.kernels.cpu import FEW_TOKENS
from moe_jax.layers import Dropless, FfnOptions
from moe_jax.layers.experts.experts import FeedForwardExperts
from moe_jax.layers.experts.few_tokens import Batched, Unrolled, unrolled
from moe_jax.layers.ffn import FfnLayer
from moe_jax.routing import token_choice

E, K, M, F = 5, 2, 6, 11


def run(dispatch, layer, params, x, routing):
  """The output of feed-forward experts with one kind of dispatch."""

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
      experts = FeedForwardExperts(layer, dispatch, name='experts')
      return experts(x, routing)[0]

  variables = {'params': {'experts': params}}
  return jax.jit(Layer().apply)(variables, x)


@pytest.mark.as_users_compile
@pytest.mark.parametrize(
  ('tokens', 'use_bias'),
  [
    (1, False),
    # Prompts in `tests/generation` have more tokens than are few.
    (FEW_TOKENS, True),
  ],
)
def test_equals_stacked_experts(tokens, use_bias):
  rng = np.random.default_rng(tokens)
  x = rng.normal(size=(1, tokens, M)).astype(np.float32)
  # One expert has no token, and one has most of them.
  logits = rng.normal(size=(1, tokens, E)) + [0, 3, 0, -90, 0]
  mask = np.arange(tokens)[None] != 2  # one token is padding
  x[~mask] = np.nan
  route = functools.partial(
    token_choice, num_selected=K, capacity=None, gates='renormalized'
  )
  routing = jax.jit(route)(logits.astype(np.float32), mask=mask)
  layer = FfnLayer(FfnOptions(F, 'swiglu', 'all' if use_bias else 'none'))
  shapes = {'w_in': (M, F), 'w_gate': (M, F), 'w_out': (F, M)}
  if use_bias:
    shapes |= {'b_in': (F,), 'b_gate': (F,), 'b_out': (M,)}
  params = {
    name: jnp.asarray(rng.normal(size=(E, *shape)).astype(np.float32))
    for name, shape in shapes.items()
  }
  expected = run(Dropless(), layer, params, x, routing)
  unstacked = unrolled({'experts': params})['experts']
  output = run(Unrolled(), layer, unstacked, x, routing)
  np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)
  assert np.abs(np.asarray(output)[0, -1]).max() > 0.01
  output = run(Batched(), layer, params, x, routing)
  np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_experts_that_nobody_chose_are_not_read():
  # The kernels of experts without tokens are NaN, which any product with them
  # would show.
  x = jnp.ones((1, 3, M))
  logits = jnp.array([[[9.0, 8, 0, 0, 0]] * 3])
  routing = token_choice(logits, num_selected=K, capacity=None)
  kernels = {'w_in': jnp.ones((E, M, F)), 'w_out': jnp.ones((E, F, M))}
  kernels = {k: w.at[2:].set(jnp.nan) for k, w in kernels.items()}
  unstacked = unrolled({'experts': kernels})['experts']
  y = run(Unrolled(), FfnLayer(FfnOptions(F)), unstacked, x, routing)
  assert np.isfinite(np.asarray(y)).all()
