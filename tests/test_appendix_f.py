"""Who takes which token, in training and in inference, as one mask."""

import jax.numpy as jnp
import numpy as np

from experiments import shazeer_appendix_f
from moe_jax.routing import SlotRouting

E, K = shazeer_appendix_f.E, shazeer_appendix_f.K


def kept(**router):
  """What the middle layer of three sows."""
  return {'intermediates': {'layers_1': {'moe': {'router': router}}}}


def test_choices_of_tokens_are_a_mask():
  index = np.array([[[3, 0, 5, 15]], [[2, 1, 0, 7]]])  # [G, S, K]
  found = shazeer_appendix_f.chosen(kept(expert_index=(jnp.array(index),)))
  expected = np.zeros((2, E), bool)
  expected[0, [3, 0, 5, 15]] = expected[1, [2, 1, 0, 7]] = True
  np.testing.assert_array_equal(found, expected)


def test_choices_of_experts_are_a_mask():
  # Two groups of three tokens, two slots; 3 stands for an empty one.
  index = np.full((2, E, 2), 3)
  index[0, 4] = [2, 0]
  index[1, 4] = [1, 3]
  index[1, 9] = [1, 2]
  slots = SlotRouting(jnp.array(index, jnp.int32), jnp.ones((2, E, 2)), 3)
  found = np.asarray(shazeer_appendix_f.chosen(kept(slots=(slots,))))
  assert found.shape == (6, E)
  rows, experts = np.nonzero(found)
  taken = sorted(zip(rows.tolist(), experts.tolist(), strict=True))
  assert taken == [(0, 4), (2, 4), (4, 4), (4, 9), (5, 9)]


def test_agreement_is_of_the_pairs_that_either_makes():
  one = jnp.array([[True, True, False, False], [True, False, False, False]])
  other = jnp.array([[True, False, True, False], [True, False, False, False]])
  assert shazeer_appendix_f.agreement(one, other) == 0.5  # 2 of 4
