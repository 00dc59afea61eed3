"""Balancing by running totals: which experts sit out, and others' gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_jax.routing import mixture_stats, running_totals
from tests import reference


def test_one_example_by_hand():
  # Three experts got 9, 3 and 0 of twelve examples, 4 each on average. The
  # first is ahead by 5, more than the margin of 4: its gate of 0.6 becomes 0,
  # and the others share it in the ratio of their gates, 3 to 1.
  totals = jnp.array([9.0, 3.0, 0.0])
  out = running_totals.overused(totals, 4.0)
  np.testing.assert_array_equal(out, [True, False, False])
  logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
  gates = running_totals.constrained_gates(logits, out)
  np.testing.assert_allclose(gates, [[0.0, 0.75, 0.25]], rtol=1e-6)
  # A lead equal to the margin is allowed.
  assert not running_totals.overused(totals, 5.0).any()
  # With the example totals are 9, 3.75 and 0.25.
  new_totals = running_totals.moved(totals, gates.sum(0))
  mean = (9 + 3.75 + 0.25) / 3
  np.testing.assert_allclose(
    new_totals, [9 - mean, 3.75 - mean, 0.25 - mean], rtol=1e-5
  )


@pytest.mark.parametrize('margin', [0.5, 3.0, 1000.0])
@pytest.mark.parametrize('E', [2, 5])
def test_steps_follow_the_definition(E, margin):
  T, B = 30, 7
  rng = np.random.default_rng(E)
  logits = rng.normal(np.linspace(2, 0, E), 1.0, (T, B, E)).astype(np.float32)

  @jax.jit
  def step(totals, logits):
    out = running_totals.overused(totals, margin)
    gates = running_totals.constrained_gates(logits, out)
    return running_totals.moved(totals, gates.sum(0)), gates

  _, balanced_gates = jax.lax.scan(step, jnp.zeros(E), jnp.asarray(logits))
  expected = reference.balanced_gates(logits, margin)
  np.testing.assert_allclose(balanced_gates, expected, rtol=1e-4, atol=1e-6)
  # With a large margin no expert sits out.
  assert (expected == 0).any() == (margin < 1000)


@settings(max_examples=60, deadline=None)
@given(
  hnp.arrays(np.float32, 5, elements=st.floats(-1e6, 1e6, width=32)),
  hnp.arrays(np.float32, (3, 5), elements=st.floats(-80, 80, width=32)),
  st.sampled_from([0.0, 0.25, 64.0]),
)
def test_gates_sum_to_one_and_never_all_sit_out(totals, logits, margin):
  out = running_totals.overused(jnp.asarray(totals), margin)
  gates = np.asarray(running_totals.constrained_gates(jnp.asarray(logits), out))
  out = np.asarray(out)
  assert not out.all()
  np.testing.assert_allclose(gates.sum(-1), 1.0, rtol=1e-5)
  assert not gates[:, out].any()
  assert (gates[:, ~out] > 0).any(-1).all()
  exact = totals.astype(np.float64)
  lead = exact - exact.mean()
  # The mean is taken in float32, in which numbers below 1e-38 are 0.
  slack = 1e-6 * np.abs(exact).max() + 1e-37
  assert (lead[out] > margin - slack).all()
  allowed = ~out & (exact > exact.min())
  assert (lead[allowed] <= margin + slack).all()


def test_equal_totals_whose_mean_is_rounded_let_all_in():
  rng = np.random.default_rng(0)
  number = rng.uniform(1, 2, (200, 1)).astype(np.float32)
  totals = jnp.tile(number, (1, 6))
  # Six totals are equal, and yet all can be above their mean in float32.
  assert (totals > totals.mean(-1, keepdims=True)).all(-1).any()
  out = jax.vmap(lambda row: running_totals.overused(row, 0.0))(totals)
  assert not out.any()


def test_totals_of_a_long_run_lose_no_gate():
  # In 40 steps of a million examples each, totals differ by half an example,
  # which a float32 sum above 2^24 cannot represent.
  mass = jnp.array([2.0**20 + 0.5, 2.0**20])
  totals = jnp.zeros(2)
  for _ in range(40):
    totals = running_totals.moved(totals, mass)
  np.testing.assert_allclose(totals, [10.0, -10.0])


def test_who_sits_out_learns_nothing():
  logits = jnp.array([[0.3, -0.2, 0.1]])
  out = jnp.array([False, True, False])

  def first(logits):
    return running_totals.constrained_gates(logits, out)[0, 0]

  gradient = np.asarray(jax.grad(first)(logits))[0]
  g = 1 / (1 + np.exp(-0.2))  # gates of 0.3 and 0.1
  np.testing.assert_allclose(
    gradient, [g * (1 - g), 0.0, -g * (1 - g)], rtol=1e-5
  )


def test_the_load_of_a_mixture_is_its_gates():
  # There are two tokens and one of padding, and E=2 in a model whose largest E
  # is 3.
  gate = jnp.array([[[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]])
  mask = jnp.array([[True, True, False]])
  stats = mixture_stats(gate, jnp.log(gate + 1e-9), mask, 3)
  np.testing.assert_allclose(stats.load, [1.25, 0.75, 0.0])
  assert stats.tokens == 2 and not stats.overflowed.any()
  entropy = np.log(2) - 0.75 * np.log(0.75) - 0.25 * np.log(0.25)
  np.testing.assert_allclose(stats.entropy, entropy, rtol=1e-5)
