"""Priorities and capacities with which later tokens change earlier outputs."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import All, Fixed, Fraction, PerAssignment, PerToken, TokenChoice
from moe_jax.layers.routers import Sizes
from moe_jax.routing import token_choice
from moe_jax.routing.dispatch import gather
from moe_jax.routing.token_choice_rule import GATES, SLOT_PRIORITIES
from tests.models import tiny

S, E = 7, 5
# All of these but All() leave 1 or 2 slots for 7 tokens and 5 experts, so that
# tokens are dropped.
CAPACITIES = (
  PerToken(factor=1.0),
  PerAssignment(factor=0.4),
  Fraction(factor=0.2),
  Fixed(slots=2),
  All(),
)
SETTINGS = [
  (priority, Sizes(E, K, capacity))
  for priority in SLOT_PRIORITIES
  for K in (1, 2)
  for capacity in CAPACITIES
]
CAUSAL = [
  (priority, sizes)
  for priority, sizes in SETTINGS
  if TokenChoice(slot_priority=priority).causality(sizes).leak is None
]
LEAKING = [setting for setting in SETTINGS if setting not in CAUSAL]


def name(value):
  if isinstance(value, Sizes):
    return f'{value.num_selected}-{type(value.capacity).__name__}'
  return value


@functools.cache
def before_and_after(
  priority, num_selected, slots, gates='raw', second_policy='all'
):
  """Routing of tokens up to t, before and after later tokens are changed.

  Returns two dicts of arrays [trials, S, ...], which are zero after t.
  """
  trials = 60
  rng = np.random.default_rng(0)
  old, new = rng.normal(size=(2, trials, S, E)).astype(np.float32)
  x, other = rng.normal(size=(2, trials, S, 3)).astype(np.float32)
  t = rng.integers(0, S - 1, (trials, 1))
  past = (np.arange(S)[None] <= t)[..., None]  # tokens up to t, [trials, S, 1]

  def run(logits, x):
    routing = token_choice(
      jnp.asarray(logits),
      num_selected=num_selected,
      capacity=slots,
      slot_priority=priority,
      gates=gates,
      second_policy=second_policy,
      key=tiny.key(3),
    )
    rows = gather.dispatch(jnp.asarray(x), routing)
    rows = rows * np.arange(1, E + 1, dtype=np.float32)[:, None, None]
    outputs = {
      'kept': routing.kept,
      'slot': routing.slot,
      'gate': routing.gate,
      'y': gather.combine(rows, routing),
    }
    return {name: np.where(past, value, 0) for name, value in outputs.items()}

  return run(old, x), run(np.where(past, old, new), np.where(past, x, other))


@pytest.mark.parametrize(('priority', 'sizes'), CAUSAL, ids=name)
def test_a_causal_setting_does_not_see_later_tokens(priority, sizes):
  K, slots = sizes.num_selected, sizes.slots(S)
  policies = ['all', 'threshold'] + ['sampled'] * (K == 2)
  for i, gates in enumerate(GATES if K > 1 else ['raw'] * len(policies)):
    # Each policy meets each number of slots, and gates of most kinds.
    policy = policies[(i + slots) % len(policies)]
    old, new = before_and_after(priority, K, slots, gates, policy)
    # If nothing is dropped, a later token can move an earlier one to another
    # slot of the same expert, which changes no output.
    free = {'slot'} if not sizes.capacity.binds else set()
    for name in old.keys() - free:
      np.testing.assert_array_equal(old[name], new[name], err_msg=name)


@pytest.mark.parametrize(('priority', 'sizes'), LEAKING, ids=name)
def test_a_leaking_setting_does_see_later_tokens(priority, sizes):
  old, new = before_and_after(priority, sizes.num_selected, sizes.slots(S))
  assert (old['kept'] != new['kept']).any()
  assert (old['gate'] != new['gate']).any()
  assert (old['y'] != new['y']).any()


def test_three_ways_to_be_causal():
  # These do not depend on later tokens: token-major order, a single choice in
  # the order of tokens, and slots for every token.
  assert len(CAUSAL) == 10 + 4 + (2 + 2)
  assert len(LEAKING) == 4 + 2 * 4
