"""Layout of rows sorted by expert; test_dispatch.py has the values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import Routing, token_choice
from moe_jax.routing.dispatch import rows_by_expert, sorted_rows


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
  rows, sizes, _ = round_trip(x, routing)
  # Expert 0 has two rows and expert 1 has one; the fourth slot's row is empty.
  np.testing.assert_array_equal(
    rows, [[1, 2, 3], [4, 5, 6], [1, 2, 3], [0, 0, 0]]
  )
  np.testing.assert_array_equal(sizes, [2, 1])
  # Expert 0 multiplies by 10, expert 1 by 100.
  scale = np.float32([[10.0], [10.0], [100.0], [7.0]])
  y = np.asarray(jax.jit(sorted_rows.combine)(rows * scale, routing))
  first = np.array([1, 2, 3]) * (0.75 * 10 + 0.25 * 100)
  second = np.array([4, 5, 6]) * (0.5 * 10)
  np.testing.assert_allclose(y[0], [first, second, [0, 0, 0]], rtol=1e-6)


G, S, E, K = 2, 7, 5, 3


def routed(skew=0.0):
  """Unbounded choices of three experts."""
  logits = np.random.default_rng(0).normal(size=(G, S, E))
  logits = (logits - skew * np.arange(E)).astype(np.float32)
  return choose(logits)


choose = jax.jit(functools.partial(token_choice, num_selected=K, capacity=None))


@jax.jit
def round_trip(x, routing):
  rows = sorted_rows.dispatch(x, routing)
  sizes = routing.rows_per_expert()
  return rows, sizes, sorted_rows.combine(rows, routing)


def test_experts_without_a_bound_take_all_choices_in_order():
  x = np.random.default_rng(1).normal(size=(G, S, 6)).astype(np.float32)
  routing = routed()
  rows, sizes, y = round_trip(x, routing)
  expert, gate = np.asarray(routing.expert_index), np.asarray(routing.gate)
  order = np.argsort(expert.ravel(), kind='stable')
  np.testing.assert_array_equal(rows, x.reshape(-1, 6)[order // K])
  np.testing.assert_array_equal(sizes, np.bincount(expert.ravel(), minlength=E))
  np.testing.assert_allclose(y, x * gate.sum(-1, keepdims=True), rtol=1e-5)


def test_no_row_is_lost_however_skewed():
  # Every token chooses experts 0, 1 and 2, far more than an even share.
  ones = np.ones((G, S, 6), np.float32)
  rows, sizes, _ = round_trip(ones, routed(skew=30.0))
  np.testing.assert_array_equal(sizes, [14, 14, 14, 0, 0])
  assert np.all(rows)


def test_what_is_not_kept_is_not_sent():
  routing = routed()
  kept, x = np.array(routing.kept), np.ones((G, S, 6), np.float32)
  kept[0, 3], x[0, 3] = False, np.nan
  routing = dataclasses.replace(routing, kept=jnp.asarray(kept))
  rows, sizes, _ = round_trip(x, routing)
  assert np.isfinite(rows).all() and np.sum(sizes) == 42 - 3


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
  np.testing.assert_array_equal(rows_by_expert(routing).token, order)
