"""Every backend of the grouped products equals the loops that define them."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from moe_jax.kernels import BACKENDS, blocks, grouped_matmul, megablox
from moe_jax.kernels.grouped_products import describe
from tests import reference

N, E, M, F = 30, 5, 6, 7
HAS_TOKAMAX = importlib.util.find_spec('tokamax') is not None
NAMES = [
  pytest.param(
    name,
    marks=pytest.mark.skipif(
      name == 'tokamax' and not HAS_TOKAMAX, reason='tokamax is not installed'
    ),
  )
  for name in BACKENDS
]
every_backend = pytest.mark.parametrize('name', NAMES)


def arrays(shape=(N, E, M, F), seed=0):
  """Random rows, kernels and the gradient of the products."""
  N, E, M, F = shape
  rng = np.random.default_rng(seed)
  sizes = (N, M), (E, M, F), (N, F)
  return [rng.normal(size=size).astype(np.float32) for size in sizes]


@functools.cache
def program(name):
  """A function (x, w, group_sizes, dy) -> y, dx, dw with one backend."""

  @jax.jit
  def run(x, w, group_sizes, dy):
    y, pull = jax.vjp(
      lambda x, w: grouped_matmul(x, w, group_sizes, name), x, w
    )
    return y, *pull(dy)

  return run


def by_definition(x, w, group_sizes, dy):
  y = reference.grouped_matmul(x, w, group_sizes)
  dx = reference.grouped_matmul(dy, w.swapaxes(1, 2), group_sizes)
  return y, dx, reference.grouped_outer(x, dy, group_sizes)


def check(name, x, w, group_sizes, dy, dtype='float32'):
  x, w, dy = (np.array(jnp.asarray(a, dtype), 'f') for a in (x, w, dy))
  x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
  results = program(name)(x, w, jnp.array(group_sizes, jnp.int32), dy)
  x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
  expected = by_definition(x, w, group_sizes, dy)
  for part, value, by_loops in zip(('y', 'dx', 'dw'), results, expected):
    # Sums are of float32, and are compared on the scale of their terms.
    rtol = 2.0**-8 if value.dtype == jnp.bfloat16 else 1e-5
    value = np.asarray(value, np.float64)
    np.testing.assert_allclose(value, by_loops, rtol, 1e-4, err_msg=part)
  return results


def test_three_tokens_by_hand():
  # Expert 0 doubles its two tokens, expert 1 has none, and expert 2 negates its
  # tokens.
  x = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
  w = np.stack([2 * np.eye(2), 7 * np.eye(2), -np.eye(2)])
  y = np.array([[2.0, 4.0], [6.0, 8.0], [-5.0, -6.0]])
  np.testing.assert_array_equal(reference.grouped_matmul(x, w, [2, 0, 1]), y)
  # The gradient of the sum of y: each column of a kernel's gradient is the sum
  # of its tokens.
  dw = [[[4, 4], [6, 6]], [[0, 0], [0, 0]], [[5, 5], [6, 6]]]
  outer = reference.grouped_outer(x, np.ones((3, 2)), [2, 0, 1])
  np.testing.assert_array_equal(outer, dw)


@pytest.mark.parametrize('name', ['auto', *NAMES])
@pytest.mark.parametrize(
  'group_sizes',
  [
    (7, 3, 11, 4, 5),
    pytest.param((0, 13, 0, 17, 0), marks=pytest.mark.as_users_compile),
    (0, 0, 0, 0, 30),
  ],
)
def test_value_and_gradients(name, group_sizes):
  x, w, dy = arrays()
  check(name, x, w, group_sizes, dy)


@every_backend
@pytest.mark.parametrize(
  'group_sizes',
  [
    pytest.param((4, 0, 11, 3, 5), marks=pytest.mark.as_users_compile),
    (1, 0, 0, 0, 0),
    (0, 0, 0, 0, 0),
  ],
)
def test_rows_of_no_group_count_for_nothing(name, group_sizes):
  x, w, dy = arrays()
  grouped = sum(group_sizes)
  x[grouped:], dy[grouped:] = np.nan, np.nan
  y, dx, _ = check(name, x, w, group_sizes, dy)
  assert not np.any(np.asarray(y)[grouped:])
  assert not np.any(np.asarray(dx)[grouped:])


@pytest.mark.as_users_compile
@pytest.mark.parametrize(
  ('name', 'shape', 'group_sizes', 'dtype'),
  [
    # The second group has several full blocks and ends within a tile.
    ('blocks', (1100, 3, 6, 7), (1, 1061, 33), 'float32'),
    ('blocks', (1100, 3, 6, 7), (300, 0, 800), 'float32'),
    ('megablox', (1100, 3, 6, 7), (1, 1061, 33), 'float32'),
    # Widths have several tiles and are no multiples of a tile.
    ('megablox', (140, 2, 600, 520), (131, 5), 'float32'),
    # No tile divides the widths, and only the last group fills its blocks.
    ('pallas_gpu', (300, 5, 150, 200), (70, 0, 99, 3, 128), 'float32'),
    # One expert has all rows, and its last block lacks one.
    ('pallas_gpu', (257, 3, 40, 36), (0, 257, 0), 'float32'),
    # There are more blocks of one row than fit into a band; then whole tiles.
    ('pallas_gpu', (40, 20, 64, 16), (1,) * 20, 'bfloat16'),
    # The outer product has five bands of two tiles; some rows have no expert.
    ('pallas_gpu', (90, 2, 1200, 24), (33, 40), 'bfloat16'),
  ],
)
def test_groups_and_widths_of_several_blocks(name, shape, group_sizes, dtype):
  assert 2 * blocks.block_sizes(1100, 3)[-1] < 1061
  x, w, dy = arrays(shape)
  w /= np.sqrt(shape[2])
  dy[sum(group_sizes) :] = np.nan
  check(name, x, w, group_sizes, dy, dtype)


@every_backend
def test_gradients_of_float32_kernels_are_not_rounded(name):
  # One expert has two rows of ones. The gradient is 1 + 2^-10, which bfloat16
  # rounds to 1. The product is 2^-7 above 1, the smallest difference in
  # bfloat16.
  x = jnp.ones((2, 1), jnp.bfloat16)
  w = jnp.full((1, 1, 1), 1 + 2.0**-7, jnp.float32)
  dy = jnp.array([[1], [2.0**-10]], jnp.bfloat16)
  y, dx, dw = program(name)(x, w, jnp.array([2], jnp.int32), dy)
  assert (y.dtype, dx.dtype, dw.dtype) == ('bfloat16', 'bfloat16', 'float32')
  np.testing.assert_array_equal(dw, [[[1 + 2.0**-10]]])
  np.testing.assert_array_equal(y.astype('float32'), [[1 + 2.0**-7]] * 2)
  np.testing.assert_array_equal(
    dx.astype('float32'), dy.astype('float32') * (1 + 2.0**-7)
  )


@every_backend
def test_sums_of_bfloat16_rows_are_float32(name):
  # In bfloat16 256 + 1 is 256, where a sum of 300 ones would stop.
  x = jnp.ones((300, 300), jnp.bfloat16)
  w = jnp.ones((1, 300, 1), jnp.bfloat16)
  dy = jnp.ones((300, 1), jnp.bfloat16)
  y, _, dw = program(name)(x, w, jnp.array([300], jnp.int32), dy)
  np.testing.assert_array_equal(y.astype('float32'), np.full((300, 1), 300))
  np.testing.assert_array_equal(dw.astype('float32'), np.full((1, 300, 1), 300))


def test_a_tile_divides_its_width_in_whole_lanes():
  # 14336 is 112 * 128 and 14 * 1024; 5461 is padded to 43 * 128, and 43 is
  # prime.
  assert megablox.tiling(65536, 8, (4096, 14336), 1024) == (512, 1024, 1024)
  assert megablox.tiling(140, 2, (600, 520), 512) == (128, 128, 128)
  assert megablox.tiling(4096, 16, (512, 5461), 512) == (256, 512, 128)
  assert megablox.tiling(0, 8, (6, 300), 1024) == (128, 128, 384)


@every_backend
def test_no_rows_at_all(name):
  x, w, dy = arrays((0, E, M, F))
  y, dx, dw = program(name)(x, w, jnp.zeros(E, jnp.int32), dy)
  assert y.shape == (0, F) and dx.shape == (0, M)
  np.testing.assert_array_equal(dw, np.zeros((E, M, F)))


@every_backend
def test_a_batch_of_products_is_one_after_the_other(name):
  sizes = jnp.array([[7, 3, 11, 4, 5], [0, 0, 30, 0, 0]], jnp.int32)
  cases = [arrays(seed=seed) for seed in range(2)]
  x, w, dy = (np.stack(batch) for batch in zip(*cases))
  results = jax.vmap(program(name))(x, w, sizes, dy)
  results, sizes = jax.tree.map(np.asarray, (results, sizes))
  for i, (x, w, dy) in enumerate(cases):
    for value, by_loops in zip(results, by_definition(x, w, sizes[i], dy)):
      np.testing.assert_allclose(value[i], by_loops, rtol=1e-5, atol=1e-4)


def test_a_platform_has_its_backend():
  platforms = ('cpu', 'tpu', 'cuda', 'rocm')
  backends = [describe('auto', platform) for platform in platforms]
  assert backends == ['blocks', 'megablox', 'pallas_gpu', 'blocks']
  assert 'slow' in describe('pallas_gpu', 'cpu')


@pytest.mark.skipif(HAS_TOKAMAX, reason='tokamax is installed')
def test_the_missing_package_of_a_backend_is_named():
  x, w, _ = arrays()
  with pytest.raises(ValueError, match=r"'tokamax': .*moe_jax\[tokamax\]"):
    grouped_matmul(x, w, jnp.full(E, 6, jnp.int32), 'tokamax')


def test_products_of_one_shape_are_traced_once():
  x, w, _ = arrays((29, E, M, M))
  sizes = jnp.array([29, 0, 0, 0, 0], jnp.int32)

  def layers(x):
    for _ in range(3):
      x = grouped_matmul(x, w, sizes, 'blocks')
    return x

  program = jax.make_jaxpr(layers)(x)
  products = [
    id(inner)
    for call in program.eqns
    for outer in core.jaxprs_in_params(call.params)
    for equation in outer.eqns
    for inner in core.jaxprs_in_params(equation.params)
  ]
  assert len(products) == 3 and len(set(products)) == 1
