"""Columns that lead to the same expert, told by an example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.routing import given_choice_rule


def test_two_columns_of_one_expert_are_two_slots_of_it():
  # Columns 0 and 2 lead to expert 1. Each column serves two choices: token 0
  # has both of these columns, token 1 is the second in the queue of column 0,
  # and token 2 is one too many there.
  logits = jnp.log(
    jnp.array([[[0.5, 0.1, 0.4], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]])
  )

  @jax.jit
  def run(logits):
    columns = routing.token_choice(logits, num_selected=2, capacity=2)
    expert_of = jnp.array([1, 0, 1], jnp.int32)
    return columns, routing.to_experts(
      columns, expert_of, num_experts=2, capacity=4
    )

  columns, experts = run(logits)
  assert (experts.num_experts, experts.capacity) == (2, 4)
  for name, expected in {
    'expert_index': [[1, 1], [1, 0], [0, 1]],
    'slot': [[0, 1], [2, 0], [1, 0]],
    'kept': [[1, 1], [1, 1], [1, 0]],
  }.items():
    np.testing.assert_array_equal(getattr(experts, name)[0], expected)
  np.testing.assert_array_equal(experts.gate, columns.gate)
  np.testing.assert_allclose(
    experts.gate[0], [[0.5, 0.4], [0.6, 0.3], [0.7, 0]], rtol=1e-5
  )


@pytest.mark.parametrize('num_experts', [1, 5])
def test_the_sort_and_the_sum_give_the_same_places(num_experts):
  rng = np.random.default_rng(0)
  expert = jnp.asarray(rng.integers(num_experts, size=37), jnp.int32)
  queued = jnp.asarray(rng.random(37) < 0.7)
  by_sum = given_choice_rule.places_by_sum(expert, queued, num_experts)
  by_sort = given_choice_rule.places_by_sort(expert, queued, num_experts)
  np.testing.assert_array_equal(by_sort, by_sum)
  assert by_sum.max() > 3
