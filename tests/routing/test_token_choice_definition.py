"""Token choice equals its definition, one choice after another, in loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import token_choice
from moe_jax.routing.token_choice_rule import (
  GATES,
  SECOND_POLICIES,
  SLOT_PRIORITIES,
)
from tests import reference

G, S, E = 2, 7, 5


def settings(K):
  """Yields options that K allows: every pair of them, and every queue."""
  gates = itertools.cycle(GATES if K > 1 else ('raw', 'sigmoid'))
  policies = [p for p in SECOND_POLICIES if p != 'sampled' or K == 2]
  for policy, priority, capacity in itertools.product(
    policies, SLOT_PRIORITIES, (1, 3, None)
  ):
    yield dict(
      num_selected=K,
      capacity=capacity,
      gates=next(gates),
      slot_priority=priority,
      second_policy=policy,
      second_threshold=0.6,
    )


def example(seed):
  """Random logits [G, S, E], and a mask with some padding in each group."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(G, S, E)).astype(np.float32)
  mask = rng.random((G, S)) < (0.7 if seed else 1.0)
  return jnp.asarray(logits), jnp.asarray(mask)


def assert_same(routing, expected):
  for name in ('expert_index', 'slot', 'kept'):
    np.testing.assert_array_equal(
      getattr(routing, name), getattr(expected, name), err_msg=name
    )
  np.testing.assert_allclose(routing.gate, expected.gate, rtol=1e-5, atol=1e-7)
  assert routing.expert_index.dtype == routing.slot.dtype == jnp.int32
  assert routing.gate.dtype == jnp.float32


@pytest.mark.parametrize('K', [1, 2])
def test_follows_the_definition(K):
  for i, options in enumerate(settings(K)):
    logits, mask = example(i % 3)
    key = jax.random.key(i % 3)
    draws = np.asarray(jax.random.uniform(key, (G, S, K)))
    assert_same(
      token_choice(logits, mask=mask, key=key, **options),
      reference.token_choice(logits, mask=mask, draws=draws, **options),
    )


@pytest.mark.parametrize('capacity', [1, 3])
def test_gshards_two_loops_as_printed(capacity):
  unsent_in_queue = 0
  for seed in range(5):
    logits = example(seed)[0]
    key = jax.random.key(seed)
    routing = token_choice(
      logits,
      num_selected=2,
      capacity=capacity,
      gates='renormalized',
      slot_priority='choice_major',
      second_policy='sampled',
      key=key,
    )
    draws = np.asarray(jax.random.uniform(key, (G, S, 2)))
    groups = [
      reference.gshard_top_2(logits[g], capacity, draws[g]) for g in range(G)
    ]
    stacked = [np.stack(field) for field in list(zip(*groups))[:4]]
    assert_same(routing, reference.Reference(*stacked, None))
    kept, slot = np.asarray(routing.kept), np.asarray(routing.slot)
    unsent_in_queue += (~kept & (slot < capacity)).sum()
  assert unsent_in_queue > 0  # only then policies differ
