"""The topology-aware gate by hand, by definition, and what always holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import limited_rules, token_choice_rule
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


def test_sizes_that_do_not_fit_are_refused():
  logits, node, mask = map(jnp.asarray, example(2, 6))
  sizes = dict(num_selected=1, num_nodes=2, limit=0)
  for name, value, problem in (
    ('num_nodes', 4, 'num_experts=6 is not divisible by num_nodes=4'),
    ('num_selected', 4, r'num_selected=4 not in \[1, 3\], the 6 experts on 2'),
    ('num_selected', 0, r'num_selected=0 not in \[1, 3\]'),
    ('limit', -1, 'limit=-1 is negative'),
  ):
    with pytest.raises(ValueError, match=problem):
      limited_rules.limited_choice(logits, node, mask, **{**sizes, name: value})
