"""The dense feed-forward equals plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit

from moe_jax.layers import (
  ACTIVATIONS,
  FanIn,
  FeedForward,
  FeedForwardExpert,
  FfnOptions,
  Gpt2,
  Numerics,
  Shared,
)
from tests.models import tiny

M, F = 6, 11


def gelu_tanh(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def clamped_swiglu(value, gate):
  """The hidden values of gpt-oss, whose gate has no lower limit."""
  gate, value = np.minimum(gate, 7), np.clip(value, -7, 7)
  return (value + 1) * gate * expit(1.702 * gate)


# Each pair is a function of the products, and the kernels beside w_in.
FORMULAS = {
  'relu': (lambda x: np.maximum(x, 0), ()),
  'gelu': (lambda x: x / 2 * (1 + erf(x / np.sqrt(2))), ()),
  'gelu_tanh': (gelu_tanh, ()),
  'geglu': (lambda x, gate: gelu_tanh(gate) * x, ('gate',)),
  'swiglu': (lambda x, gate: gate * expit(gate) * x, ('gate',)),
  'clamped_swiglu': (clamped_swiglu, ('gate',)),
  'doubly_gated_swiglu': (
    lambda x, gate, factor: gate * expit(gate) * x * factor,
    ('gate', 'factor'),
  ),
}


def draw_params(gates, bias):
  rng = np.random.default_rng(0)
  shapes = {'w_in': (M, F), 'w_out': (F, M)}
  shapes |= {f'w_{name}': (M, F) for name in gates}
  if bias != 'none':
    shapes |= {'b_in': (F,), 'b_out': (M,)}
  if bias == 'all':
    shapes |= {f'b_{name}': (F,) for name in gates}
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


# Layers say which biases they have, or ('') the model does; in runs that were
# saved before the gate could have a bias it has none.
@pytest.mark.parametrize(
  ('name', 'bias', 'model'),
  [('relu', 'none', True), ('swiglu', 'none', False), ('swiglu', '', True)]
  + [(name, 'all', False) for name in ACTIVATIONS],
)
def test_feed_forward_equals_its_formula(name, bias, model):
  function, gates = FORMULAS[name]
  p = draw_params(gates, bias)
  # Products are so large that limits matter.
  x = np.random.default_rng(1).normal(size=(2, 3, M)).astype(np.float32) * 3
  layer = FeedForward(FfnOptions(F, name, bias), Shared(use_bias=model))
  shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.asarray(x))
  assert set(shapes['params']) == set(p)
  # The activation applies to the gate's product, not to the other ones.
  h = function(
    *(x @ p[f'w_{name}'] + p.get(f'b_{name}', 0) for name in ('in', *gates))
  )
  expected = h @ p['w_out'] + p.get('b_out', 0)
  y = jax.jit(layer.apply)({'params': p}, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)


def test_biases_of_experts_are_those_of_dense_layers_unless_they_say():
  expert = FeedForwardExpert().within(FfnOptions(F, 'swiglu', 'all'), 0.0)
  assert expert.twin(2).ffn == FfnOptions(2 * F, 'swiglu', 'all')
  plain = FeedForwardExpert(bias='none').within(FfnOptions(F, bias='all'), 0.0)
  assert plain.bias == 'none'


@pytest.mark.parametrize(
  ('init', 'std_in', 'std_out'),
  [
    (FanIn(), (1 / 50) ** 0.5, (1 / 80) ** 0.5),
    (FanIn(scale=0.1), (0.1 / 50) ** 0.5, (0.1 / 80) ** 0.5),
    (Gpt2(), 0.02, 0.02 / 4),
  ],
)
def test_kernels_start_with_the_named_deviation(init, std_in, std_out):
  # The standard deviation of 4000 draws of a kernel is known to about 1 %.
  shared = Shared(Numerics(init=init), num_layers=8)
  layer = FeedForward(FfnOptions(80), shared)
  params = layer.init(tiny.key(0), jnp.ones((1, 50)))['params']
  w_in, w_out = (np.asarray(params[k].unbox()) for k in ('w_in', 'w_out'))
  np.testing.assert_allclose(w_in.std(), std_in, rtol=0.06)
  np.testing.assert_allclose(w_out.std(), std_out, rtol=0.06)
