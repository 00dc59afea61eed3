"""GPTQ against a definition of its own, and against rounding to nearest."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import gptq
from moe_jax.kernels.kernel_format import KernelFormat
from tests import reference

FORMATS = {name: KernelFormat(name) for name in ('ternary', 'int2', 'int4')}
SEEDS, R, I, O = 40, 24, 11, 3


def correlated(seed, inputs=I, units=O, rows=R):
  """A kernel, and rows of inputs that are correlated."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs))
  w = rng.normal(size=(inputs, units))
  return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


class Rounded(NamedTuple):
  codes: Any
  grid: Any
  values: Any


@functools.partial(jax.jit, static_argnames='format')
def round_both_ways(w, h, format):
  """Weights rounded by GPTQ and to nearest, and whether the two must agree."""
  grid, factor = format.grid(w), gptq.factor(h)
  both = gptq.gptq(w, format, grid, factor), format.codes(w, grid)
  results = [Rounded(x, grid, format.values(x, grid)) for x in both]
  return *results, factor.plain


@pytest.fixture(scope='module', name='roundings')
def make_roundings():
  w, x = map(jnp.stack, zip(*map(correlated, range(SEEDS))))
  h = gptq.hessian(x, jnp.ones(x.shape[:-1], bool))
  return {
    name: (w, *round_both_ways(w, h, format)[:2], h)
    for name, format in FORMATS.items()
  }


@functools.partial(jax.jit, static_argnums=0)
def nearest_of(format, grid, row):
  return format.values(format.codes(row[None], grid), grid)[0]


@pytest.mark.parametrize('name', FORMATS)
def test_gptq_is_its_definition(name, roundings):
  w, rounded, to_nearest, h = roundings[name]
  errors = np.asarray(gptq.error(w, rounded.values, h))
  nearest_values = to_nearest.values
  grid, values = jax.device_get((rounded.grid, rounded.values))
  w, h = np.asarray(w), np.asarray(h)
  for e in range(5):
    expert_grid = jax.tree.map(lambda leaf, e=e: leaf[e], grid)

    def nearest(row, expert_grid=expert_grid):
      return np.asarray(
        nearest_of(FORMATS[name], expert_grid, row.astype(np.float32))
      )

    damping = gptq.DAMPING * np.diag(h[e]).mean()
    expected = reference.gptq(w[e], h[e] + damping * np.eye(I), nearest)
    np.testing.assert_allclose(values[e], expected, atol=1e-6)
    change = (w[e] - values[e]).T
    error = np.trace(change @ h[e] @ change.T)
    np.testing.assert_allclose(errors[e], error, rtol=1e-3)
  # It is greedy, so that single matrices may come out worse than to nearest.
  assert errors.sum() < 0.9 * np.sum(gptq.error(w, nearest_values, h))


@pytest.mark.parametrize('name', FORMATS)
def test_without_correlation_it_rounds_to_nearest(name, roundings):
  # The second expert has no token, and the third's Hessian is damaged.
  h = np.tile(np.eye(I, dtype=np.float32), (SEEDS, 1, 1))
  h[1], h[2, 0, 0] = 0, np.nan
  rounded, nearest, plain = round_both_ways(
    roundings[name][0], jnp.asarray(h), FORMATS[name]
  )
  assert np.flatnonzero(plain).tolist() == [1, 2]
  np.testing.assert_array_equal(rounded.codes, nearest.codes)


def test_blocks_of_inputs_change_nothing(monkeypatch):
  w, x = correlated(3)
  h = gptq.hessian(x, jnp.ones(R, bool))
  unblocked = round_both_ways(w, h, FORMATS['int4'])[0]
  monkeypatch.setattr(gptq, 'BLOCK', 4)  # 11 inputs: the last block has three
  round_ = jax.jit(gptq.gptq, static_argnums=1)
  codes = round_(w, FORMATS['int4'], unblocked.grid, gptq.factor(h))
  np.testing.assert_array_equal(codes, unblocked.codes)


def test_rows_that_do_not_count_are_left_out():
  _, x = correlated(4)
  counted = jnp.arange(R) < 9
  x = x.at[20].set(jnp.nan)
  h = gptq.hessian(x, counted)
  np.testing.assert_allclose(h, x[:9].T @ x[:9], rtol=1e-4, atol=1e-4)
