"""Choices at random or in turn: by definition, and even."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import random_choice
from moe_jax.routing.rules_without_logits import choice_in_turn
from tests import reference

G, S, E, K = 3, 1000, 5, 2


def choice(seed):
  return np.asarray(
    random_choice(
      jax.random.key(seed),
      num_groups=G,
      group_size=S,
      num_experts=E,
      num_selected=K,
    )
  )


def test_every_ordered_pair_is_as_likely():
  experts = choice(0)
  assert experts.shape == (G, S, K)
  pairs = collections.Counter(map(tuple, experts.reshape(-1, K).tolist()))
  assert set(pairs) == set(itertools.permutations(range(E), K))
  # 3,000 draws of 20 pairs give 150 to each, with a standard deviation of 12.
  np.testing.assert_allclose(list(pairs.values()), 150, atol=5 * 12)


def test_draws_are_used_as_the_definition_says():
  bits = np.asarray(jax.random.bits(jax.random.key(0), (G, S, K)))
  expected = [reference.drawn(map(int, row), E) for row in bits[1, :40]]
  np.testing.assert_array_equal(choice(0)[1, :40], expected)


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


@pytest.mark.parametrize(('E', 'K'), [(5, 2), (3, 3), (7, 4)])
def test_loads_of_a_group_differ_by_one_at_most(E, K):
  rng = np.random.default_rng(E)
  for first in (0, 3):
    for mask in (rng.random((6, 11)) < 0.7, np.ones((6, 11), bool)):
      sizes = dict(num_experts=E, num_selected=K, first=first)
      index = np.asarray(choice_in_turn(jnp.asarray(mask), **sizes))
      assert index.min() >= 0 and index.max() < E
      assert all(len(set(row)) == K for row in index.reshape(-1, K))
      load = loads(index, mask, E)
      assert np.ptp(load, axis=1).max() <= 1
      if mask.all():  # over all groups, too
        assert np.ptp(load.sum(0)) <= 1
