"""Feed-forward experts on sorted rows, fused or not, equal plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import blocks, grouped_ffn
from tests import reference
from tests.models.tiny import assert_trees_close

N, E, M, F = 30, 5, 6, 7


def gelu(x):
  return x * jax.nn.sigmoid(1.7 * x)


def gated(x, z):
  return gelu(x) * z


HIDDEN = {'plain': gelu, 'gated': gated}


def arrays(kind, shape=(N, E, M, F), seed=0):
  """Random rows, input kernels, output kernel and the output's gradient."""
  N, E, M, F = shape
  rng = np.random.default_rng(seed)

  def draw(*size):
    return (rng.normal(size=size) / np.sqrt(size[-2])).astype(np.float32)

  w_ins = tuple(draw(E, M, F) for _ in range(2 if kind == 'gated' else 1))
  rows = rng.normal(size=(2, N, M)).astype(np.float32)
  return rows[0], w_ins, draw(E, F, M), rows[1]


@functools.cache
def program(kind, backend):
  """A compiled function (x, w_ins, w_out, group_sizes, dy) -> y, gradients."""

  @jax.jit
  def run(x, w_ins, w_out, group_sizes, dy):
    y, pull = jax.vjp(
      lambda *args: grouped_ffn(*args, group_sizes, HIDDEN[kind], backend),
      x,
      w_ins,
      w_out,
    )
    return y, *pull(dy)

  return run


def by_definition(kind, x, w_ins, w_out, group_sizes, dy):
  """Values y, dx, dw_ins, dw_out by the chain rule, in float64."""
  product, outer = reference.grouped_matmul, reference.grouped_outer
  n = sum(group_sizes)
  x, dy = (np.where(np.arange(len(a))[:, None] < n, a, 0.0) for a in (x, dy))
  first, *rest = (product(x, w, group_sizes) for w in w_ins)
  sigmoid = 1 / (1 + np.exp(-1.7 * first))
  slope = sigmoid + 1.7 * first * sigmoid * (1 - sigmoid)
  h = first * sigmoid * (rest[0] if rest else 1.0)
  dh = product(dy, w_out.swapaxes(1, 2), group_sizes)
  d_firsts = [dh * slope * (rest[0] if rest else 1.0)]
  if rest:
    d_firsts.append(dh * first * sigmoid)
  dx = sum(
    product(d, w.swapaxes(1, 2), group_sizes) for d, w in zip(d_firsts, w_ins)
  )
  dw_ins = tuple(outer(x, d, group_sizes) for d in d_firsts)
  y = product(h, w_out, group_sizes)
  return y, dx, dw_ins, outer(h, dy, group_sizes)


KINDS = dict(auto='gated', blocks='plain', megablox='gated')
SMALL, LARGE = (N, E, M, F), (1100, 3, 6, 7)
SMALL_GROUPS = (0, 13, 0, 17, 0), (9, 1, 4, 0, 5), (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
  ('backend', 'kind', 'shape', 'group_sizes'),
  [
    *(
      (backend, kind, SMALL, group_sizes)
      for backend, kind in KINDS.items()
      for group_sizes in SMALL_GROUPS
    ),
    # Several full blocks follow a first one that is not full.
    ('blocks', 'gated', LARGE, (1, 1061, 33)),
  ],
)
def test_value_and_gradients(backend, kind, shape, group_sizes):
  x, w_ins, w_out, dy = arrays(kind, shape)
  n = sum(group_sizes)
  x[n:], dy[n:] = np.nan, np.nan
  sizes = jnp.array(group_sizes, jnp.int32)
  results = program(kind, backend)(x, w_ins, w_out, sizes, dy)
  expected = by_definition(kind, x, w_ins, w_out, group_sizes, dy)
  assert_trees_close(results, expected, rtol=1e-4, atol=1e-4)
  y, dx = (np.asarray(result) for result in results[:2])
  assert not np.any(y[n:]) and not np.any(dx[n:])


@pytest.mark.parametrize('backend', ['blocks', 'megablox'])
def test_bfloat16_rows_leave_float32_kernels_a_float32_gradient(backend):
  # One expert has width one, and its gate is the identity on ones: the gradient
  # of w_out is 1 + 2^-10, which bfloat16 rounds to 1.
  x = jnp.ones((2, 1), jnp.bfloat16)
  kernel = jnp.ones((1, 1, 1), jnp.float32)
  dy = jnp.array([[1], [2.0**-10]], jnp.bfloat16)
  sizes = jnp.array([2], jnp.int32)

  @jax.jit
  def run(x, a, b, dy):
    y, pull = jax.vjp(
      lambda x, a, b: grouped_ffn(x, (a,), b, sizes, jax.nn.relu, backend),
      x,
      a,
      b,
    )
    return y, *pull(dy)

  y, dx, dw_in, dw_out = run(x, kernel, kernel, dy)
  assert y.dtype == dx.dtype == jnp.bfloat16
  assert dw_in.dtype == dw_out.dtype == jnp.float32
  np.testing.assert_array_equal(dw_out, [[[1 + 2.0**-10]]])
  np.testing.assert_array_equal(dw_in, [[[1 + 2.0**-10]]])


# Tests of the loop's block sizes follow.


@pytest.mark.parametrize(
  ('num_rows', 'num_experts', 'expected'),
  [
    # A share is 512: sixteenths of it, up to a quarter more.
    (4096, 8, [64, 128, 256, *range(384, 641, 32)]),
    (4096, 256, [8, 16, 24]),
    (2**20, 8, [128, 256, 512, *range(768, 1281, 64)]),  # never larger
    (2, 8, [2]),  # one token: no more rows than there are
    (30, 1, [8, 16, 24, 30]),
  ],
)
def test_block_sizes(num_rows, num_experts, expected):
  assert blocks.block_sizes(num_rows, num_experts) == expected


@pytest.mark.parametrize(
  ('group_sizes', 'num_rows'), [((3, 0, 20, 1), 24), ((3, 0, 20, 1), 30)]
)
def test_blocks_cover_each_row_once_and_no_idle_expert(group_sizes, num_rows):
  def body(block, kernels, carry):
    coverage, visits, rows = carry
    ones = block.own_rows(jnp.ones((num_rows, 1)))
    coverage = block.write(coverage, block.rows(coverage) + ones)
    visits = visits.at[block.expert].add(1)
    return coverage, visits, rows + block.size

  carry = (jnp.zeros((num_rows, 1)), jnp.zeros(4, jnp.int32), jnp.int32(0))
  coverage, visits, rows = jax.jit(
    lambda sizes: blocks.for_each_block(body, carry, (), sizes, num_rows)
  )(jnp.array(group_sizes, jnp.int32))
  n = sum(group_sizes)
  np.testing.assert_array_equal(coverage[:, 0], [1] * n + [0] * (num_rows - n))
  full = blocks.block_sizes(num_rows, 4)[-1]
  np.testing.assert_array_equal(visits, [-(-g // full) for g in group_sizes])
  # Sizes of such small blocks are multiples of 8, so that an expert with rows
  # wastes less than 8.
  assert int(rows) <= n + 7 * sum(g > 0 for g in group_sizes)
