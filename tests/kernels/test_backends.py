"""Every backend of the grouped products equals the loops that define them."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import (
  BACKENDS,
  blocks,
  grouped_matmul,
  grouped_products,
  megablox,
)
from moe_jax.kernels.grouped_products import check_shapes, describe
from tests import reference

N, E, M, F = 30, 5, 6, 7
every_backend = pytest.mark.parametrize('name', BACKENDS)


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


def check(name, x, w, group_sizes, dy):
  results = program(name)(x, w, jnp.array(group_sizes, jnp.int32), dy)
  expected = by_definition(x, w, group_sizes, dy)
  for part, value, by_loops in zip(('y', 'dx', 'dw'), results, expected):
    # Sums are of float32, and are compared on the scale of their terms.
    np.testing.assert_allclose(
      value, by_loops, rtol=1e-5, atol=1e-4, err_msg=part
    )
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


@pytest.mark.parametrize('name', ['auto', *BACKENDS])
@pytest.mark.parametrize(
  'group_sizes',
  [
    (7, 3, 11, 4, 5),
    pytest.param((0, 13, 0, 17, 0), marks=pytest.mark.as_users_compile),
    (0, 0, 30, 0, 0),
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
  ('name', 'shape', 'group_sizes'),
  [
    # The second group has several full blocks and ends within a tile.
    ('blocks', (1100, 3, 6, 7), (1, 1061, 33)),
    ('blocks', (1100, 3, 6, 7), (300, 0, 800)),
    ('megablox', (1100, 3, 6, 7), (1, 1061, 33)),
    # Widths have several tiles and are no multiples of a tile.
    ('megablox', (140, 2, 600, 520), (131, 5)),
  ],
)
def test_groups_and_widths_of_several_blocks(name, shape, group_sizes):
  x, w, dy = arrays(shape)
  w /= np.sqrt(shape[2])
  dy[sum(group_sizes) :] = np.nan
  check(name, x, w, group_sizes, dy)


def test_those_sizes_are_of_several_blocks():
  assert 2 * blocks.block_sizes(1100, 3)[-1] < 1061
  sizes = np.array([140, 600, 520])
  tiles = megablox.tiling(140, 2, (600, 520), 512)
  assert (sizes > tiles).all() and (sizes % tiles).all()


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


@pytest.mark.parametrize('name', BACKENDS)
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
  assert megablox.tiling(4096, 16, (512, 5461), 512) == (256, 512, 128)
  assert megablox.tiling(0, 8, (6, 300), 1024) == (128, 128, 384)


def test_unknown_backend():
  x, w, _ = (jnp.asarray(array) for array in arrays())
  sizes = jnp.full(E, 6, jnp.int32)
  with pytest.raises(ValueError, match=r"'block'; did you mean 'blocks'"):
    grouped_matmul(x, w, sizes, 'block')
  by_platform = grouped_products.BY_PLATFORM.values()
  assert {*by_platform, grouped_products.DEFAULT} == set(BACKENDS)


def test_shapes_that_do_not_fit():
  x, w, _ = arrays()
  with pytest.raises(ValueError, match=r'width 6 by kernels \(5, 7, 6\)'):
    check_shapes(x, w.swapaxes(1, 2), np.full(E, 6))
  with pytest.raises(ValueError, match='4 group sizes for 5 experts'):
    check_shapes(x, w, np.full(4, 6))
  with pytest.raises(ValueError, match=r'kernels \(6, 7\).*\[E, M, F\]'):
    check_shapes(x, w[0], np.full(5, 6))
  with pytest.raises(ValueError, match='group sizes of float64'):
    check_shapes(x, w, np.full(5, 6.0))


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


def test_what_a_run_says_of_its_backend():
  assert describe('auto', 'cpu') == 'blocks'
  assert describe('auto', 'tpu') == 'megablox'
  assert describe('auto', 'rocm') == 'blocks'
  assert describe('megablox', 'tpu') == 'megablox'
  assert 'slow' in describe('pallas_gpu', 'cpu')


def test_products_of_one_shape_are_traced_once(monkeypatch):
  traced_shapes = []

  def matmul(x, w, group_sizes, transposed):
    traced_shapes.append(x.shape)
    return blocks.matmul(x, w, group_sizes, transposed)

  counted = types.SimpleNamespace(matmul=matmul)
  monkeypatch.setitem(BACKENDS, 'blocks', counted)
  shape = 29, E, M, M  # that no other test has
  x, w, _ = arrays(shape)
  sizes = jnp.array([29, 0, 0, 0, 0], jnp.int32)

  def layers(x):
    for _ in range(3):
      x = grouped_matmul(x, w, sizes, 'blocks')
    return x

  jax.make_jaxpr(layers)(x)
  assert traced_shapes == [(29, M)]
