"""Layout of rows sorted by expert; test_dispatch.py has the values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import sorted_rows
from moe_jax.routing import Routing, token_choice


def test_three_tokens_by_hand():
  # Two experts have two slots each. Token 0 goes to both, token 1 only to
  # expert 0, and token 2 nowhere: expert 0 was full when it came.
  routing = Routing(
    expert_index=jnp.array([[[1, 0], [0, 1], [0, 1]]], jnp.int32),
    slot=jnp.array([[[0, 0], [1, 0], [2, 0]]], jnp.int32),
    gate=jnp.array([[[0.25, 0.75], [0.5, 0.0], [0.0, 0.0]]]),
    kept=jnp.array([[[True, True], [True, False], [False, False]]]),
    num_experts=2,
    capacity=2,
  )
  x = jnp.array([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]])
  rows = sorted_rows.dispatch(x, routing)
  # Expert 0 has two rows and expert 1 has one; the fourth slot's row is empty.
  np.testing.assert_array_equal(
    rows, [[1, 2, 3], [4, 5, 6], [1, 2, 3], [0, 0, 0]]
  )
  np.testing.assert_array_equal(sorted_rows.group_sizes(routing), [2, 1])
  # Expert 0 multiplies by 10, expert 1 by 100.
  scale = jnp.array([[10.0], [10.0], [100.0], [7.0]])
  y = sorted_rows.combine(rows * scale, routing)
  first = np.array([1, 2, 3]) * (0.75 * 10 + 0.25 * 100)
  second = np.array([4, 5, 6]) * (0.5 * 10)
  np.testing.assert_allclose(y[0], [first, second, [0, 0, 0]], rtol=1e-6)


def routed(capacity, skew=0.0):
  G, S, E, K = 2, 7, 5, 3
  logits = jax.random.normal(jax.random.key(0), (G, S, E))
  logits = logits - skew * jnp.arange(E)[None, None]
  return token_choice(logits, num_selected=K, capacity=capacity)


def test_an_unbounded_routing_is_one_with_room_for_all():
  x = jax.random.normal(jax.random.key(1), (2, 7, 6))
  bounded, unbounded = routed(7), routed(None)
  assert unbounded.capacity is None
  rows = sorted_rows.dispatch(x, unbounded)
  np.testing.assert_array_equal(rows, sorted_rows.dispatch(x, bounded))
  np.testing.assert_array_equal(
    sorted_rows.combine(rows, unbounded), sorted_rows.combine(rows, bounded)
  )


def test_no_row_is_lost_however_skewed():
  # Every token chooses experts 0, 1 and 2, far more than an even share.
  routing = routed(None, skew=30.0)
  np.testing.assert_array_equal(
    sorted_rows.group_sizes(routing), [14, 14, 14, 0, 0]
  )
  assert sorted_rows.dispatch(jnp.ones((2, 7, 6)), routing).all()


def test_rows_are_bounded_by_slots():
  # There are 42 choices, but only 20 slots: 2 groups of 5 experts of 2 slots.
  routing = routed(2)
  rows = sorted_rows.dispatch(jnp.ones((2, 7, 6)), routing)
  assert rows.shape == (20, 6)
  assert int(rows.any(-1).sum()) == int(routing.kept.sum())


def test_what_is_not_kept_is_not_sent():
  routing = routed(None)
  kept = routing.kept.at[0, 3].set(False)
  routing = dataclasses.replace(routing, kept=kept)
  x = jnp.ones((2, 7, 6)).at[0, 3].set(jnp.nan)
  assert jnp.isfinite(sorted_rows.dispatch(x, routing)).all()
  assert int(sorted_rows.group_sizes(routing).sum()) == 42 - 3


@pytest.mark.parametrize('num_experts', [5, 2**27 - 1])
def test_rows_of_an_expert_are_in_the_order_of_the_tokens(num_experts):
  # The product of the largest expert's number and 40 tokens exceeds int32, in
  # which the usual sort key is computed.
  low = np.random.default_rng(0).integers(0, 5, 40)
  expert = np.where(low % 2, num_experts - 1 - low, low).astype(np.int32)
  expert = jnp.asarray(expert).reshape(1, 40, 1)
  routing = Routing(
    expert,
    slot=jnp.zeros_like(expert),
    gate=jnp.ones(expert.shape),
    kept=jnp.ones(expert.shape, bool),
    num_experts=num_experts,
    capacity=None,
  )
  order = np.argsort(np.asarray(expert).reshape(-1), kind='stable')
  np.testing.assert_array_equal(routing.sorted_rows().token, order)
