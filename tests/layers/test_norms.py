"""Norms equal their formulas, with statistics in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import Numerics, Shared
from moe_jax.layers.norms import NORMS

EPSILON = 0.25  # large enough to matter


def formula(kind, x, params):
  if kind == 'layernorm':
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
  return x * params['scale'] + params.get('bias', 0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('use_bias', [False, True])
@pytest.mark.parametrize('kind', NORMS.builtin)
def test_norm_equals_its_formula(kind, use_bias, dtype):
  rng = np.random.default_rng(0)
  # The mean is 10 and the standard deviation 1, which statistics in bfloat16
  # would lose.
  x = jnp.asarray(rng.normal(10, 1, (2, 3, 64)), dtype)
  shared = Shared(Numerics(dtype), use_bias)
  norm = NORMS.builtin[kind](EPSILON).module(shared, 'norm')
  shapes = jax.eval_shape(norm.init, jax.random.key(0), x)['params']
  # An rmsnorm has no bias, whether `use_bias` is set or not.
  biased = use_bias and kind == 'layernorm'
  assert set(shapes) == ({'scale', 'bias'} if biased else {'scale'})
  params = {
    name: rng.normal(size=64).astype(np.float32) for name in sorted(shapes)
  }
  y = jax.jit(norm.apply)({'params': params}, x)
  assert y.dtype == dtype
  expected = formula(kind, np.asarray(x, np.float64), params)
  tolerance = 1e-4 if dtype == 'float32' else 0.01
  np.testing.assert_allclose(
    np.asarray(y, np.float64), expected, rtol=tolerance, atol=tolerance
  )


@pytest.mark.parametrize('use_bias', [False, True])
def test_a_layernorm_may_have_a_bias_of_its_own(use_bias):
  for bias, biased in (
    ('always', True), ('never', False), ('model', use_bias)
  ):  # fmt: skip
    norm = NORMS.builtin['layernorm'](bias=bias)
    module = norm.module(Shared(use_bias=use_bias), 'norm')
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 3)))
    assert ('bias' in shapes['params']) == biased
