"""Experts of decoding steps equal the stacked ones in their loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import FfnConfig
from moe_jax.layers.experts.few_tokens import (
  FEW_TOKENS,
  BatchedExperts,
  UnrolledExperts,
  most_are_chosen,
  unstack,
)
from moe_jax.layers.experts.sorted_rows_experts import DroplessExperts
from moe_jax.routing import token_choice

E, K, M, F = 5, 2, 6, 11


@pytest.mark.parametrize('use_bias', [False, True])
@pytest.mark.parametrize('tokens', [1, 7, FEW_TOKENS, 37, 300])
def test_equals_stacked_experts(tokens, use_bias):
  rng = np.random.default_rng(tokens)
  x = jnp.asarray(rng.normal(size=(1, tokens, M)), jnp.float32)
  # One expert is nobody's, and one has most.
  logits = rng.normal(size=(1, tokens, E)) + [0, 3, 0, -90, 0]
  mask = jnp.arange(tokens)[None] != 2  # padding among them
  routing = token_choice(
    jnp.asarray(logits, jnp.float32),
    num_selected=K,
    capacity=None,
    mask=mask,
    gates='renormalized',
  )
  config = FfnConfig(F, activation='swiglu', use_bias=use_bias)
  stacked = DroplessExperts(config)
  shapes = jax.eval_shape(stacked.init, jax.random.key(0), x, routing)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
    nn.meta.unbox(shapes)['params'],
  )
  expected = jax.jit(stacked.apply)({'params': params}, x, routing)
  own = {'params': unstack(params)}
  found = jax.jit(UnrolledExperts(config).apply)(own, x, routing)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  assert np.abs(np.asarray(found)[0, -1]).max() > 0.01
  if tokens <= FEW_TOKENS:
    found = jax.jit(BatchedExperts(config).apply)(
      {'params': params}, x, routing
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_most_are_chosen():
  # Of Mixtral's 8 experts two rows leave 0.75^2 on average, three 0.75^3.
  assert not most_are_chosen(2, 2, 8)
  assert most_are_chosen(3, 2, 8)
  assert not most_are_chosen(16, 1, 128)


def test_experts_that_nobody_chose_are_not_read():
  # Their kernels are NaN, and one product with those would show.
  x = jnp.ones((1, 3, M))
  logits = jnp.array([[[9.0, 8, 0, 0, 0]] * 3])
  routing = token_choice(logits, num_selected=K, capacity=None)
  kernels = {'w_in': jnp.ones((E, M, F)), 'w_out': jnp.ones((E, F, M))}
  kernels = {k: w.at[2:].set(jnp.nan) for k, w in kernels.items()}
  own = {'params': unstack(kernels)}
  y = jax.jit(UnrolledExperts(FfnConfig(F)).apply)(own, x, routing)
  assert np.isfinite(np.asarray(y)).all()
