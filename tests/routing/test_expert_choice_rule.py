"""Expert choice equals its definition, and depends on later tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from moe_jax.routing import expert_choice, routing_stats
from moe_jax.routing.expert_choice_rule import shares
from tests import reference

G, S, E, C = 2, 7, 5, 3

compiled = jax.jit(
  lambda logits, mask, capacity: expert_choice(
    logits, capacity=capacity, mask=mask
  ),
  static_argnums=2,
)
stats_of = jax.jit(routing_stats, static_argnums=3)
softmax = jax.jit(jax.nn.softmax)


def draw(seed, *shape):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape or (G, S, E)).astype(np.float32)


def test_four_tokens_by_hand():
  # Expert 0 prefers tokens 0 and 1, expert 1 tokens 2 and 3.
  probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
  logits, real = np.log(probs)[None].astype(np.float32), np.ones((1, 4), bool)
  routing = compiled(logits, real, 2)
  np.testing.assert_array_equal(routing.token_index, [[[0, 1], [2, 3]]])
  np.testing.assert_allclose(routing.gate, [[[0.9, 0.6], [0.8, 0.5]]], 1e-6)
  # With one slot each, two tokens get no expert.
  routing = compiled(logits, real, 1)
  np.testing.assert_array_equal(routing.token_index, [[[0], [2]]])
  stats = stats_of(routing, jnp.asarray(logits), jnp.asarray(real), 3)
  np.testing.assert_array_equal(stats.load, [1, 1])
  # All K = 3 choices of these tokens are lost.
  np.testing.assert_array_equal(stats.overflowed, [2, 2, 2])


@pytest.mark.parametrize('capacity', [1, C, S])
def test_the_definition(capacity):
  for seed in range(3):
    logits = draw(seed)
    mask = np.random.default_rng(seed).random((G, S)) < 0.8
    mask[1] &= seed > 0  # sometimes a group of padding alone
    routing = compiled(logits, mask, capacity)
    index, gate = reference.expert_choice(
      logits.astype(np.float64), capacity, mask
    )
    np.testing.assert_array_equal(routing.token_index, index)
    np.testing.assert_allclose(routing.gate, gate, rtol=1e-5)
    assert routing.token_index.dtype == jnp.int32
    assert (routing.num_experts, routing.capacity) == (E, capacity)
    stats = stats_of(routing, jnp.asarray(logits), jnp.asarray(mask), 4)
    covered = [set(index[g].ravel()) - {S} for g in range(G)]
    np.testing.assert_array_equal(
      stats.overflowed, [mask.sum() - sum(map(len, covered))] * 4
    )
    np.testing.assert_array_equal(stats.load, (index < S).sum((0, 2)))
    np.testing.assert_array_equal(stats.kept_load, stats.load)
    assert stats.tokens == mask.sum() and not np.any(stats.unsent)


# Logits are small whole numbers, so that equal probabilities are frequent.
few_examples = settings(max_examples=20, deadline=None, derandomize=True)
some_logits = st_np.arrays(np.float32, (G, S, E), elements=st.integers(-2, 2))


@few_examples
@given(some_logits, st_np.arrays(bool, (G, S)), st.sampled_from([1, C, S]))
def test_contract(logits, mask, capacity):
  routing = jax.tree.map(np.asarray, compiled(logits, mask, capacity))
  probs = np.asarray(softmax(logits))
  for g in range(G):
    real = set(np.flatnonzero(mask[g]))
    for e in range(E):
      index, gate = routing.token_index[g, e], routing.gate[g, e]
      tokens = [int(s) for s in index if s < S]
      # Each slot has at most one token, none has padding, and empty slots are
      # last.
      assert len(tokens) == len(set(tokens)) and set(tokens) <= real
      assert list(index) == tokens + [S] * (capacity - len(tokens))
      assert len(tokens) == -(-capacity * len(real) // S)
      np.testing.assert_allclose(gate[: len(tokens)], probs[g, tokens, e], 1e-5)
      assert not gate[len(tokens) :].any()
      refused = [(-probs[g, s, e], s) for s in real - set(tokens)]
      assert all((-probs[g, s, e], s) < p for s in tokens for p in refused)


def test_shares_are_exact_where_products_pass_32_bits():
  S, C = 131_072, 131_071
  real = np.array([0, 1, 70_001, S])
  expected = -(-C * real.astype(object) // S)
  counts = shares(jnp.asarray(real, jnp.int32), S, C)
  np.testing.assert_array_equal(counts, expected.astype(int))


def test_logits_of_half_precision_are_routed_in_float32():
  # The import hook, which checks types in tests alone, is off here: the rule
  # itself must convert.
  half = jnp.asarray(draw(0), jnp.bfloat16)
  routing = expert_choice(half, capacity=C)
  exact = expert_choice(half.astype(jnp.float32), capacity=C)
  assert routing.gate.dtype == jnp.float32
  np.testing.assert_array_equal(routing.gate, exact.gate)
