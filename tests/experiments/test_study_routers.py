"""A router that a single study adds, on choices made by hand."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.deepseek_table1 import WithoutBest
from moe_jax.layers.routers.contract import Sizes
from moe_jax.layers.shared import Shared
from moe_jax.routing.capacity import All


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
