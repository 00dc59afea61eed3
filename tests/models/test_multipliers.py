"""Granite's four multipliers, by hand and as transformers has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attention import AttentionOptions
from tests.models import tiny

DENSE = dict(layers='none')


def test_multipliers_are_those_of_kernels():
  # A number before a product is one in its kernel; tied logits also have that
  # of the embeddings, so that embeddings are not tied here.
  multipliers = dict(
    embedding=dict(tie=False, multiplier=3.0, logits_divisor=0.5),
    residual_multiplier=0.25,
    attention=dict(scale='fixed', fixed_scale=0.2),
  )
  scaled = tiny.build(DENSE, **multipliers)
  plain = tiny.build(
    DENSE, embedding=dict(tie=False), attention=dict(scale='none')
  )
  params = tiny.params_of(scaled)
  factors = {'w_query': 0.2, 'w_out': 0.25, 'w_logits': 2.0, 'embedding': 3.0}

  def multiplied(path, leaf):
    return factors.get(path[-1].key, 1.0) * leaf

  new_params = jax.tree_util.tree_map_with_path(multiplied, params)
  tokens = jnp.asarray(tiny.tokens())
  logits = tiny.apply(scaled)(params, tokens)[0]
  assert np.std(logits) > 0.1
  np.testing.assert_allclose(
    logits, tiny.apply(plain)(new_params, tokens)[0], rtol=1e-4, atol=1e-4
  )


def test_logits_have_a_bias_before_they_are_divided():
  embedding = dict(logits_divisor=4.0)
  biased = tiny.build(DENSE, embedding=dict(logits_bias=True, **embedding))
  plain = tiny.build(DENSE, embedding=embedding)
  params = tiny.params_of(biased)
  bias = params['b_logits']
  assert bias.shape == (tiny.V,)
  rest = {name: leaf for name, leaf in params.items() if name != 'b_logits'}
  tokens = jnp.asarray(tiny.tokens())
  difference = (
    tiny.apply(biased)(params, tokens)[0] - tiny.apply(plain)(rest, tokens)[0]
  )
  expected = np.broadcast_to(bias / 4, difference.shape)
  np.testing.assert_allclose(difference, expected, rtol=1e-3, atol=1e-5)


def test_a_fixed_scale_without_effect_is_refused():
  with pytest.raises(ValueError, match=r'fixed_scale=0\.5 has no effect'):
    AttentionOptions(fixed_scale=0.5)
