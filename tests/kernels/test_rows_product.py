"""The product of rows and kernels, with its gradient, by formula."""

import jax
import numpy as np
import pytest

from moe_jax.kernels.rows_product import rows_matmul

R, M, F = 3, 6, 11


@pytest.mark.as_users_compile
@pytest.mark.parametrize('experts', [(), (5,)])
def test_value_and_gradients_are_those_of_the_product(experts):
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
    np.testing.assert_allclose(value, formula, rtol=1e-5, atol=1e-5)
