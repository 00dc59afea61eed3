"""Random experts differ, all sets are equally likely, and keys matter."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import even_choice, random_choice
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


def test_another_key_is_another_choice():
  agree = (choice(0) == choice(1)).mean()
  # The share of equal choices has a standard deviation of 0.005.
  np.testing.assert_allclose(agree, 1 / E, atol=0.03)


@pytest.mark.parametrize('slot_priority', ['token_major', 'choice_major'])
def test_even_choices_are_served_as_equal_logits_would_be(slot_priority):
  # Random experts have slots and queues as others; only their gates differ.
  index = choice(2)[:, :9]
  mask = np.ones((G, 9), bool)
  mask[1, 4:] = False
  routing = jax.jit(
    lambda index, mask: even_choice(
      index, num_experts=E, capacity=3, mask=mask, slot_priority=slot_priority
    )
  )(index, mask)
  routing = jax.tree.map(np.asarray, routing)
  lines = [reference.visits(slot_priority, np.zeros((9, E)), K)] * G
  for g, line in enumerate(lines):
    load = collections.Counter()
    for s, k in line:
      expert = index[g, s, k]
      served = mask[g, s] and load[expert] < 3
      assert routing.kept[g, s, k] == served
      assert routing.gate[g, s, k] == (0.5 if served else 0.0)
      if mask[g, s]:
        assert routing.slot[g, s, k] == load[expert]
        load[expert] += 1
  assert not routing.kept[mask].all()


def test_no_token_is_surer_of_a_random_choice_than_another():
  with pytest.raises(ValueError, match="unknown slot_priority 'batch_prio"):
    even_choice(
      jnp.asarray(choice(0)),
      num_experts=E,
      capacity=1,
      slot_priority='batch_priority',
    )
