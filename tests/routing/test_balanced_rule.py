"""Even choices: experts in turn, whatever is padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.rules_without_logits import choice_in_turn


def loads(index, mask, E):
  """The choices of each expert in each group, in plain loops."""
  count = np.zeros((len(mask), E), int)
  for g, s in np.argwhere(mask):
    for e in index[g, s]:
      count[g, e] += 1
  return count


def test_three_tokens_take_the_experts_in_turn():
  mask = jnp.array([[True, False, True, True]])
  index = choice_in_turn(mask, num_experts=3, num_selected=2)
  # The second token is padding: whatever it has, nobody takes its turn.
  np.testing.assert_array_equal(index[0, [0, 2, 3]], [[0, 1], [2, 0], [1, 2]])


@pytest.mark.parametrize(('E', 'K'), [(5, 1), (5, 2), (4, 3), (3, 3), (7, 4)])
def test_loads_of_a_group_differ_by_one_at_most(E, K):
  rng = np.random.default_rng(E)
  for first in (0, 3):
    mask = rng.random((6, 11)) < 0.7
    index = np.asarray(
      choice_in_turn(
        jnp.asarray(mask), num_experts=E, num_selected=K, first=first
      )
    )
    assert index.min() >= 0 and index.max() < E
    assert all(len(set(row)) == K for row in index.reshape(-1, K))
    assert np.ptp(loads(index, mask, E), axis=1).max() <= 1
    full = np.ones_like(mask)
    index = np.asarray(
      choice_in_turn(
        jnp.asarray(full), num_experts=E, num_selected=K, first=first
      )
    )
    assert np.ptp(loads(index, full, E).sum(0)) <= 1  # over all groups, too


def test_more_choices_than_experts_are_refused():
  with pytest.raises(ValueError, match='num_selected=3'):
    choice_in_turn(jnp.ones((1, 2), bool), num_experts=2, num_selected=3)
