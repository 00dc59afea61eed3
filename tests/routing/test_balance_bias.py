"""How a balancing bias moves; what it does is in `tests/layers/routers`."""

import jax.numpy as jnp
import numpy as np

from moe_jax.routing import balance_bias


def test_a_bias_moves_against_the_load():
  # The mean load is 4: above it the bias falls, below it it rises, and at it it
  # stays; layers are independent. The third had no token.
  load = jnp.array([[9, 1, 2, 4], [4] * 4, [0] * 4], jnp.float32)
  bias = jnp.full((3, 4), 0.5, jnp.float32)
  new_bias = balance_bias.moved(bias, load, 0.01)
  expected = [[0.49, 0.51, 0.51, 0.5], [0.5] * 4, [0.5] * 4]
  np.testing.assert_allclose(new_bias, expected, rtol=1e-6)
  # By the rule 'error' a step is as long as the load is wrong, relative to the
  # mean: -5/4, 3/4, 2/4 and 0.
  new_bias = balance_bias.moved(bias, load, 0.01, 'error')
  expected = [[0.4875, 0.5075, 0.505, 0.5], [0.5] * 4, [0.5] * 4]
  np.testing.assert_allclose(new_bias, expected, rtol=1e-6)
