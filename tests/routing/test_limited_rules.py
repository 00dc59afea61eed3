"""Choices limited to nodes or groups of experts, by hand and by definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import limited_rules, token_choice_rule
from moe_jax.routing.limited_rules import GROUP_SCORES, OUTSIDE, limited_scores
from tests import reference

STATIC = ('num_selected', 'num_nodes', 'limit')
limited_choice = jax.jit(limited_rules.limited_choice, static_argnames=STATIC)
choose = jax.jit(token_choice_rule.choose, static_argnums=1)


def log(probs):
  return np.log(np.float32(probs))[None]


# Four experts are on two nodes, 0 and 1 on the first, where the group is. The
# first three tokens like an expert of the other node best.
EXAMPLE = log(
  [
    [0.30, 0.10, 0.40, 0.20],
    [0.05, 0.15, 0.10, 0.70],
    [0.10, 0.20, 0.50, 0.20],
    [0.60, 0.10, 0.25, 0.05],
  ]
)
FIRST_NODE = np.zeros(1, np.int32)
REAL = np.ones((1, 4), bool)
# The second token is padding.
PADDED = np.array([[True, False, True, True]])


def choices_of(K, limit, mask=REAL):
  index = limited_choice(
    EXAMPLE, FIRST_NODE, mask, num_selected=K, num_nodes=2, limit=limit
  )
  return np.asarray(index)[0].tolist()


def test_the_published_gate_is_told():
  # Nobody may leave: each has its best expert of 0 and 1.
  assert choices_of(1, 0) == [[0], [1], [1], [0]]
  # The second token, with 0.7, may leave alone; then the third, with 0.5.
  assert choices_of(1, 1) == [[0], [3], [1], [0]]
  assert choices_of(1, 2) == [[0], [3], [2], [0]]
  assert choices_of(1, 3) == [[2], [3], [2], [0]]
  # A token that is padding leaves its place to the next.
  assert choices_of(1, 1, PADDED)[2] == [2]
  # With two choices the last token, too, wants a remote expert, with 0.25, the
  # lowest score. A token that stays has both choices in its own node.
  assert choices_of(2, 3) == [[2, 0], [3, 1], [2, 1], [0, 1]]
  assert choices_of(2, 4)[3] == [0, 2]


G, S = 11, 7
# The nodes Q, devices of a node m, experts E, choices K and the limit.
SIZES = [
  (2, 1, 6, 1, 0),
  (2, 2, 8, 3, 2),
  (3, 2, 12, 2, 0),
  (3, 2, 12, 2, S),
  (4, 1, 8, 2, 3),
  (1, 2, 4, 2, 2),
]


@functools.cache
def example(Q, E, seed=0):
  """Logits, of which some tie, nodes and a mask with some padding."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(G, S, E)).astype(np.float32)
  logits[:3] = np.round(logits[:3])
  node = rng.integers(0, Q, G).astype(np.int32)
  return logits, node, rng.random((G, S)) < 0.8


@pytest.mark.parametrize(('Q', 'm', 'E', 'K', 'limit'), SIZES)
def test_follows_the_definition_and_keeps_the_limit(Q, m, E, K, limit):
  logits, node, mask = example(Q, E)
  # The owner of an expert is one of m devices; its node is what counts.
  owner = np.arange(E) // (E // (Q * m))
  index = np.asarray(
    limited_choice(logits, node, mask, num_selected=K, num_nodes=Q, limit=limit)
  )
  expected = reference.limited_choice(
    np.float64(logits), node, mask, K, Q, limit
  )
  np.testing.assert_array_equal(index, expected)
  is_remote = owner[index] // m != node[:, None, None]
  num_leaving = (is_remote.any(-1) & mask).sum(1)
  assert num_leaving.max() <= limit
  free_choice = np.asarray(choose(logits, K))
  wants = (owner[free_choice] // m != node[:, None, None]).any(-1) & mask
  np.testing.assert_array_equal(num_leaving, np.minimum(wants.sum(1), limit))
  assert Q == 1 or limit == S or (wants.sum(1) > limit).any()
  if limit == S or Q == 1:
    np.testing.assert_array_equal(index, free_choice)


def test_a_group_is_as_good_as_its_best_or_as_its_two_best():
  # Three groups of two experts. The second has the best expert of all, the
  # third the best pair; experts of the other groups can no longer be chosen.
  scores = jnp.array([0.1, 0.2, 0.9, 0.0, 0.6, 0.5])
  rule = dict(num_groups=3, chosen_groups=1)
  best = limited_scores(scores, **rule)
  inf = np.inf
  np.testing.assert_allclose(best, [-inf, -inf, 0.9, 0.0, -inf, -inf])
  pair = limited_scores(scores, **rule, group_score='two_best')
  np.testing.assert_allclose(pair, [-inf, -inf, -inf, -inf, 0.6, 0.5])
  zeros = limited_scores(scores, **rule, outside='zero')
  np.testing.assert_allclose(zeros, [0, 0, 0.9, 0.0, 0, 0])


@pytest.mark.parametrize('outside', OUTSIDE)
@pytest.mark.parametrize('group_score', GROUP_SCORES)
@pytest.mark.parametrize('chosen_groups', [2, 4])
def test_it_equals_a_loop_over_tokens(group_score, outside, chosen_groups):
  G, S, E = 2, 7, 12
  rng = np.random.default_rng(chosen_groups)
  # Rounded, so that groups tie; a bias makes some scores negative.
  scores = rng.normal(0.2, 0.5, (G, S, E)).round(1).astype(np.float32)
  rule = dict(num_groups=4, chosen_groups=chosen_groups)
  out = limited_scores(
    jnp.asarray(scores), **rule, group_score=group_score, outside=outside
  )
  best = {'best': 1, 'two_best': 2}[group_score]
  value = 0.0 if outside == 'zero' else -np.inf
  for g, s in np.ndindex(G, S):
    want = reference.limited_scores(scores[g, s], 4, chosen_groups, best, value)
    np.testing.assert_array_equal(out[g, s], want)
  if chosen_groups == 4:
    np.testing.assert_array_equal(out, scores)


def test_it_has_no_gradient():
  def total(x):
    return limited_scores(
      x, num_groups=2, chosen_groups=1, outside='zero'
    ).sum()

  np.testing.assert_array_equal(jax.grad(total)(jnp.arange(4.0)), np.zeros(4))
