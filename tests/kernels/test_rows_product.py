"""The product of rows and kernels, with its gradient, by formula."""

import jax
import numpy as np
import pytest

from moe_jax.kernels import cpu
from moe_jax.kernels.rows_product import rows_matmul

R, M, F = 3, 6, 11
# So large that the products of experts are spread over threads.
SPREAD = 66, 160, 128


@pytest.mark.as_users_compile
@pytest.mark.parametrize(
  'experts, sizes', [((), (R, M, F)), ((5,), (R, M, F)), ((3,), SPREAD)]
)
def test_value_and_gradients_are_those_of_the_product(experts, sizes):
  R, M, F = sizes
  rng = np.random.default_rng(0)
  x, w, dy = (
    rng.normal(size=(*experts, *shape)).astype(np.float32)
    for shape in ((R, M), (M, F), (R, F))
  )

  @jax.jit
  def run(x, w):
    y, pull = jax.vjp(rows_matmul, x, w)
    return y, *pull(jax.numpy.asarray(dy))

  expected = (
    np.einsum('...rm,...mf->...rf', x, w),
    np.einsum('...rf,...mf->...rm', dy, w),
    np.einsum('...rm,...rf->...mf', x, dy),
  )
  for value, formula in zip(run(x, w), expected):
    atol = 1e-6 * max(sizes)
    np.testing.assert_allclose(value, formula, rtol=1e-5, atol=atol)


def test_products_of_small_matrices_are_on_one_thread():
  # The experts of `shakespeare_switch`: 96 rows of 128, and 512 hidden values.
  # A tile of 128 x 256 costs (128 + 256) * 128 = 49,152, less than 65,536; one
  # of 64 x 64 with 512 values to contract costs just that.
  assert cpu.one_thread(rows=96, columns=512, contracted=128)
  assert not cpu.one_thread(rows=96, columns=128, contracted=512)
  assert cpu.one_thread(rows=128, columns=512, contracted=96)
  # With more than 128 rows a tile has 256, and two of them make the columns.
  assert not cpu.one_thread(rows=129, columns=512, contracted=128)
  # Too small to spread.
  assert not cpu.one_thread(rows=96, columns=64, contracted=64)


@pytest.mark.as_users_compile
def test_products_that_are_spread_contract_rows_of_their_left_operand():
  R, M, F = SPREAD
  x, w = (jax.ShapeDtypeStruct((3, *s), np.float32) for s in ((R, M), (M, F)))

  def run(x, w):
    y, pull = jax.vjp(rows_matmul, x, w)
    return y, pull(y)

  text = jax.jit(run).lower(x, w).compile().as_text()
  assert text.count('lhs_contracting_dims={1}') == 3
