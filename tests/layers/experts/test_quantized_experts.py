"""Experts in codes equal experts of the numbers that the codes stand for."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.kernels.cpu import FEW_TOKENS
from moe_jax.kernels.kernel_format import (
  FORMATS,
  TERNARY,
  KernelFormat,
  fill_up,
)
from moe_jax.layers import (
  Dropless,
  Einsum,
  FeedForwardExpert,
  Gather,
  MoE,
  MoeOptions,
  Shared,
)
from moe_jax.layers.experts import QuantizedExpert
from moe_jax.routing.capacity import All, PerAssignment

E, K, M, F = 5, 2, 12, 20
KERNELS = ('w_gate', 'w_in', 'w_out')
SHARED = Shared(use_bias=True)


@functools.partial(jax.jit, static_argnames=('options',))
def run(options, params, x):
  return MoE(options, SHARED).apply({'params': params}, x)[0]


@functools.cache
def params_of(format):
  """Parameters in codes and as numbers, and the format with its sizes."""
  rng = np.random.default_rng(0)
  layer = MoE(MoeOptions(E, K, expert=FeedForwardExpert(F, 'geglu')), SHARED)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3, M)))
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
    nn.meta.unbox(shapes)['params'],
  )
  experts = params['experts']
  codes, numbers = {}, {}
  for name in KERNELS:
    grid = format.grid(experts[name])
    rounded = format.codes(experts[name], grid)
    numbers[name] = format.values(rounded, grid)
    codes[name] = format.store(rounded, grid)
  if format.name == TERNARY:
    format = dataclasses.replace(format, num_codes=fill_up(codes.values()))
  return (
    {**params, 'experts': {**experts, **codes}},
    {**params, 'experts': {**experts, **numbers}},
    format,
  )


def options_of(format, dispatch, capacity=All()):
  """The options of a layer with experts in codes, and as numbers."""
  plain = MoeOptions(
    E,
    K,
    expert=FeedForwardExpert(F, 'geglu'),
    dispatch=dispatch,
    capacity=capacity,
  )
  expert = QuantizedExpert(F, 'geglu', format=format)
  return dataclasses.replace(plain, expert=expert), plain


@pytest.mark.parametrize(
  ('name', 'dispatch', 'capacity', 'tokens'),
  [
    ('int8', Gather(), PerAssignment(1.0), 23),
    ('ternary', Dropless(), All(), FEW_TOKENS),
    *(
      pytest.param(name, dispatch, All(), 37, marks=pytest.mark.slow)
      for name, dispatch in zip(
        FORMATS, itertools.cycle((Einsum(), Dropless(), Gather()))
      )
    ),
  ],
)
def test_codes_equal_the_numbers_they_stand_for(
  name, dispatch, capacity, tokens
):
  codes, numbers, format = params_of(KernelFormat(name))
  options, plain = options_of(format, dispatch, capacity)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, tokens, M)))
  x = x.astype(jnp.float32)
  expected = run(plain, numbers, x)
  # Outputs are in the hundreds.
  np.testing.assert_allclose(
    run(options, codes, x), expected, rtol=1e-6, atol=2e-5
  )
  assert np.abs(expected).max() > 1
