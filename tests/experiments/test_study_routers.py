"""Routers that single studies add, on choices made by hand."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.deepseek_table1 import WithoutBest
from experiments.expert_choice_table2 import capped
from moe_jax.layers.routers.contract import Sizes
from moe_jax.layers.shared import Shared
from moe_jax.routing.capacity import All


def test_a_token_refuses_experts_beyond_the_cap():
  # All three experts want token 0 most; each takes two of four tokens.
  probs = [[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.3, 0.28, 0.42], [0.2, 0.1, 0.1]]
  probs = jnp.array([probs])
  mask = jnp.ones((1, 4), bool)
  free = capped(probs, mask, capacity=2, cap=3)[0]
  np.testing.assert_array_equal(
    free.T, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
  )
  # Tokens 0 and 1 keep expert 0, and token 2 expert 2. Experts 1 and 2 turn to
  # token 3, which keeps the first of two equal ones.
  one = capped(probs, mask, capacity=2, cap=1)[0]
  np.testing.assert_array_equal(
    one.T, [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
  )
  # Padding is taken by nobody.
  padded = capped(probs, mask.at[0, 1].set(False), capacity=2, cap=3)[0]
  assert not padded[1].any() and padded[2, 0]


def test_a_token_does_without_its_likeliest_experts():
  x = jnp.eye(3)[None]  # the logits are the kernel
  kernel = jnp.array([[4.0, 3, 2, 1], [1, 2, 3, 4], [0, 9, 1, 2]])
  options = WithoutBest(disabled=1, gates='raw')
  router = options.module(Sizes(4, 2, All()), Shared())
  chosen, _ = router.apply({'params': {'w': kernel}}, x, jnp.ones((1, 3), bool))
  np.testing.assert_array_equal(
    chosen.expert_index[0], [[1, 2], [2, 1], [3, 2]]
  )
  # Gates are the probabilities among the other experts.
  probs = nn.softmax(kernel[0, 1:])
  np.testing.assert_allclose(chosen.gate[0, 0], probs[:2], rtol=1e-6)
