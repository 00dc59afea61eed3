"""The LSTM equals its equations and flax's cell; documents stay apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import Lstm, LstmOptions, Numerics, Shared
from tests import reference
from tests.models import tiny
from tests.models.tiny import draw

B, T, M = 3, 9, 5


def params_of(hidden):
  shapes = {
    'w_in': (M, 4, hidden), 'w_state': (M, 4, hidden), 'b_gates': (4, hidden),
  }  # fmt: skip
  if hidden != M:
    shapes['w_out'] = (hidden, M)
  return {k: draw(*s, seed=i) for i, (k, s) in enumerate(shapes.items())}


@functools.cache
def compiled(hidden, dtype='float32', **options):
  module = Lstm(LstmOptions(hidden, **options), Shared(Numerics(dtype)))
  return jax.jit(lambda p, x, ids: module.apply({'params': p}, x, ids)[0])


X = draw(B, T, M, seed=9)
IDS = np.array(
  [
    [1] * 9,
    [1, 1, 1, 2, 2, 2, 2, 0, 0],  # two documents, then padding
    [0, 0, 1, 1, 0, 1, 2, 3, 3],  # padding before and within documents
  ],
  np.int32,
)


@pytest.mark.parametrize('hidden', [M, 7])
def test_each_step_is_the_equations(hidden):
  params = params_of(hidden)
  y = compiled(hidden)(params, X, IDS)
  p = {'w_out': None} | {k: np.float64(v) for k, v in params.items()}
  for row in range(B):
    expected = reference.lstm(np.float64(X[row]), p, IDS[row])
    np.testing.assert_allclose(y[row], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    compiled(hidden, unroll=4)(params, X, IDS), y, atol=1e-6
  )


def test_it_starts_remembering_with_the_fan_in_of_its_input():
  module = Lstm(LstmOptions(160, forget_bias=2.0))
  boxed = module.init(tiny.key(0), jnp.ones((1, 2, 80)))['params']
  start = nn.meta.unbox(boxed)
  for name, fan_in in (('w_in', 80), ('w_state', 80), ('w_out', 160)):
    np.testing.assert_allclose(start[name].std(), fan_in**-0.5, rtol=0.05)
  np.testing.assert_array_equal(start['b_gates'].sum(1), [0, 2 * 160, 0, 0])
  assert boxed['w_state'].names == ('embed', None, 'mlp')


def test_cells_of_bfloat16_are_float32():
  # In bfloat16 a cell that gains 2^-9 a step would stop at 1.
  params = {
    'w_in': np.zeros((M, 4, M)), 'w_state': np.zeros((M, 4, M)),
    'b_gates': np.zeros((4, M)),
  }  # fmt: skip
  params = {k: np.float32(v) for k, v in params.items()}
  params['b_gates'][:, :] = np.array([20, 20, 2**-6, 20])[:, None]
  steps = 256
  x, ids = np.zeros((1, steps, M)), np.ones((1, steps), np.int32)
  y = compiled(M, dtype='bfloat16')(params, x, ids)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(y[0, -1]), np.tanh(4), rtol=0.01)
