"""GPTQ against a definition of its own, and against rounding to nearest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import gptq, grids
from tests import reference

GRIDS = {
  'ternary': grids.ternary,
  'int2': functools.partial(grids.uniform, bits=2, groups=3),
  'int4': functools.partial(grids.uniform, bits=4),
}
SEEDS, R, I, O = 200, 24, 11, 3


def correlated(seed, inputs=I, units=O, rows=R):
  """A kernel, and rows of inputs that are correlated."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs))
  w = rng.normal(size=(inputs, units))
  return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


@functools.partial(jax.jit, static_argnames='make')
def both(w, x, make):
  """Both ways of rounding, and the Hessians."""
  h = gptq.hessian(x, jnp.ones(x.shape[:-1], bool))
  grid = make(w)
  return gptq.gptq(w, grid, gptq.factor(h)), grids.nearest(w, grid), h


@pytest.fixture(scope='module', name='many')
def make_many():
  w, x = map(jnp.stack, zip(*map(correlated, range(SEEDS))))
  return {name: (w, *both(w, x, make)) for name, make in GRIDS.items()}


@pytest.mark.parametrize('name', GRIDS)
def test_gptq_is_its_definition(name, many):
  w, rounded, _, h = many[name]
  grid = rounded.grid
  for e in range(5):
    own = jax.tree.map(lambda leaf, e=e: leaf[e], grid)

    def nearest(row, i, own=own):
      here = own.of_input(i, I)
      return here.values(here.codes(jnp.asarray(row, jnp.float32)[None]))[0]

    damping = gptq.DAMPING * np.diag(h[e]).mean()
    expected = reference.gptq(w[e], h[e] + damping * np.eye(I), nearest)
    np.testing.assert_allclose(rounded.values[e], expected, atol=1e-6)


@pytest.mark.parametrize('name', GRIDS)
def test_gptq_loses_less_over_all_seeds(name, many):
  w, rounded, nearest, h = many[name]
  own = np.asarray(gptq.error(w, rounded.values, h))
  plain = np.asarray(gptq.error(w, nearest.values, h))
  for e in range(3):
    change = (w[e] - rounded.values[e]).T
    np.testing.assert_allclose(
      own[e], np.trace(change @ h[e] @ change.T), rtol=1e-3
    )
  assert own.sum() < 0.9 * plain.sum()
  # It is greedy, so that single matrices may come out worse.
  print(f'{name}: GPTQ is not better in {100 * (own >= plain).mean():.1f} %')


@pytest.mark.parametrize('name', GRIDS)
def test_without_correlation_it_rounds_to_nearest(name):
  w = jnp.stack([correlated(seed)[0] for seed in range(3)])
  x = jnp.broadcast_to(jnp.eye(I), (3, I, I))
  # The second expert has no token, and the third's Hessian is damaged.
  h = gptq.hessian(x, jnp.array([True, False, True])[:, None] & (x[0] > -1)[:1])
  h = h.at[2, 0, 0].set(jnp.nan)
  factor = jax.jit(gptq.factor)(h)
  assert factor.plain.tolist() == [False, True, True]
  grid = GRIDS[name](w)
  rounded = jax.jit(gptq.gptq)(w, grid, factor)
  np.testing.assert_array_equal(rounded.codes, grids.nearest(w, grid).codes)


def test_blocks_of_inputs_change_nothing(monkeypatch):
  w, x = correlated(3)
  whole = both(w, x, GRIDS['int4'])[0]
  monkeypatch.setattr(gptq, 'BLOCK', 4)  # 11 inputs: the last block has three
  h = gptq.hessian(x, jnp.ones(R, bool))
  blocks = jax.jit(gptq.gptq)(w, whole.grid, gptq.factor(h))
  np.testing.assert_array_equal(blocks.codes, whole.codes)


def test_rows_that_do_not_count_are_left_out():
  _, x = correlated(4)
  counted = jnp.arange(R) < 9
  x = x.at[20].set(jnp.nan)
  h = gptq.hessian(x, counted)
  np.testing.assert_allclose(h, x[:9].T @ x[:9], rtol=1e-4, atol=1e-4)
