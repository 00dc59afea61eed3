"""Two levels of gates: choices and loads by hand.

The router's are judged by definition in `tests/layers/routers`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.routing import shazeer_rules

G, S, A, B, K1, K2 = 2, 7, 4, 5, 2, 3
noisy_logits = jax.jit(routing.noisy_logits)


def test_choices_are_told():
  # The token goes to branch 2 with 0.7 and to branch 0 with 0.3. In branch 2 it
  # chooses expert 1 alone, in branch 0 expert 2. With three experts each these
  # are experts 7 and 2.
  index, gate = jax.jit(shazeer_rules.flat_choices, static_argnums=4)(
    np.int32([[[2, 0]]]),
    np.float32([[[0.7, 0.3]]]),
    np.int32([[[[1, 0], [2, 1]]]]),
    np.float32([[[[1.0, 0.0], [0.5, 0.5]]]]),
    3,
  )
  index, gate = np.asarray(index), np.asarray(gate)
  np.testing.assert_array_equal(index[0, 0], [7, 6, 2, 1])
  np.testing.assert_allclose(gate[0, 0], [0.7, 0, 0.15, 0.15])


def test_load_is_told():
  # There are two tokens and two branches of two experts. Both tokens chose
  # branch 0, with probabilities of 0.9 and 0.6; the second could also have
  # chosen branch 1, with 0.4, but no token did. Branch 0's experts have loads
  # of 1.2 and 0.8.
  def load(branch_probability):
    return shazeer_rules.hierarchical_load(
      branch_probability,
      jnp.float32([[[[0.5, 0.5]], [[0.7, 0.3]]]]),
      jnp.zeros((1, 2, 1), jnp.int32),
      jnp.ones((1, 2), bool),
    )[0]

  probability = jnp.float32([[[0.9, 0.1], [0.6, 0.4]]])
  share = (0.9 + 0.6) / 2
  expected = [share * 1.2, share * 0.8, 0, 0]
  np.testing.assert_allclose(load(probability), expected)
  # The paper has the factor Load_p for this gradient, which would be zero
  # without it.
  gradient = jax.grad(lambda p: load(p)[0])(probability)
  np.testing.assert_allclose(gradient, [[[0.6, 0], [0.6, 0]]], rtol=1e-6)
