"""Routing statistics by hand, by loops, and merged by adding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import (
  drop_rate,
  empty_aux,
  expert_choice,
  routing_stats,
  token_choice,
)
from tests import reference

G, S, E = 2, 7, 5
measure = jax.jit(routing_stats)
route = jax.jit(
  token_choice,
  static_argnames=(
    'num_selected', 'capacity', 'slot_priority', 'second_policy',
    'second_threshold',
  ),
)  # fmt: skip


@functools.cache
def example(seed, K=3, capacity=2, policy='threshold'):
  """A routing with drops, unsent choices and padding, by code and by loops."""
  rng = np.random.default_rng(seed)
  logits = jnp.asarray(2 * rng.normal(size=(G, S, E)), jnp.float32)
  mask = jnp.asarray(rng.random((G, S)) < 0.8)
  options = dict(
    num_selected=K,
    capacity=capacity,
    slot_priority='choice_major',
    second_policy=policy,
    second_threshold=0.5,
  )
  key = jax.random.key(seed)
  routing = route(logits, mask=mask, key=key, **options)
  draws = np.asarray(jax.random.uniform(key, (G, S, K)))
  by_loops = reference.token_choice(logits, mask=mask, draws=draws, **options)
  return routing, by_loops, logits, mask


def test_four_tokens_by_hand():
  # Tokens 0 to 2 choose expert 0, then expert 1, which have two slots each, so
  # that token 2 loses both choices. Token 3 is padding and does not count.
  probs = [[0.5, 0.3, 0.2], [0.6, 0.4, 0.0], [0.9, 0.1, 0.0], [0.0, 0.1, 0.9]]
  logits = jnp.asarray(np.log(np.maximum([probs], 1e-30)), jnp.float32)
  mask = jnp.array([[True, True, True, False]])
  routing = route(logits, num_selected=2, capacity=2, mask=mask)
  stats = measure(routing, logits, mask)
  assert stats.tokens == 3
  np.testing.assert_array_equal(stats.load, [3, 3, 0])
  np.testing.assert_array_equal(stats.kept_load, [2, 2, 0])
  np.testing.assert_array_equal(stats.overflowed, [1, 1])
  np.testing.assert_array_equal(stats.unsent, [0, 0])
  entropy = -sum(p * np.log(p) for p in (0.5, 0.3, 0.2, 0.6, 0.4, 0.9, 0.1))
  np.testing.assert_allclose(stats.entropy, entropy, rtol=1e-5)


@pytest.mark.parametrize(
  ('K', 'policy', 'capacity'),
  [
    (1, 'all', 1),
    (2, 'sampled', 2),
    (3, 'threshold', 2),
    (3, 'threshold', None),
  ],
)
def test_follows_the_definition(K, policy, capacity):
  unsent = 0
  for seed in range(3):
    routing, by_loops, logits, mask = example(seed, K, capacity, policy)
    stats = measure(routing, logits, mask)
    expected = reference.routing_stats(
      by_loops, np.asarray(logits, np.float64), np.asarray(mask)
    )
    for name, value in expected.items():
      np.testing.assert_allclose(
        getattr(stats, name), value, rtol=1e-5, err_msg=name
      )
    assert all(leaf.dtype == jnp.float32 for leaf in stats)
    unsent += np.sum(stats.unsent)
  assert (unsent > 0) == (policy != 'all')


def test_the_drop_rate_is_of_choices_that_found_their_expert_full():
  routing, by_loops, logits, mask = example(1)
  stats = measure(routing, logits, mask)
  fate, real = by_loops.fate, np.asarray(mask)
  full = np.array([(fate[..., k] == 'full')[real].mean() for k in range(3)])
  by_rank, overall = drop_rate(stats)
  np.testing.assert_allclose(by_rank, full, rtol=1e-6)
  np.testing.assert_allclose(overall, full.mean(), rtol=1e-6)
  # A choice that was not sent is not dropped: without a capacity the rate is 0.
  routing, _, logits, mask = example(1, capacity=None)
  stats = measure(routing, logits, mask)
  assert np.sum(stats.unsent) > 0
  assert np.sum(stats.kept_load) < np.sum(stats.load)
  assert drop_rate(stats)[1] == 0


def test_the_drop_rate_where_experts_choose_is_of_tokens_that_none_took():
  # Expert 0 takes token 0 and expert 1 token 1; two of four tokens get no
  # expert.
  @jax.jit
  def rates(logits, mask):
    routing = expert_choice(logits, capacity=1)
    return drop_rate(routing_stats(routing, logits, mask, 3))

  logits = jnp.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]])
  by_rank, overall = rates(logits, jnp.ones((1, 4), bool))
  np.testing.assert_array_equal(by_rank, [0.5] * 3)
  assert overall == 0.5


def test_the_drop_rate_of_stacked_layers_on_the_host():
  routing, _, logits, mask = example(1)
  layer = jax.tree.map(np.asarray, measure(routing, logits, mask))
  none = jax.tree.map(np.asarray, empty_aux(E, 3).stats)
  layers = jax.tree.map(lambda a, b: np.stack([a, b]), layer, none)
  with np.errstate(invalid='ignore'):
    by_rank, overall = drop_rate(layers)
  np.testing.assert_allclose(by_rank[0], drop_rate(layer)[0])
  assert by_rank.shape == (2, 3) and np.isnan(overall[1])


def test_statistics_carry_no_gradient():
  _, _, logits, mask = example(1)

  def entropy(logits):
    routing = token_choice(logits, num_selected=2, capacity=2, mask=mask)
    stats = routing_stats(routing, logits, mask)
    return stats.entropy + stats.logit_square

  assert not np.any(jax.jit(jax.grad(entropy))(logits))
