"""Token choice told by examples of few tokens, with arrays by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import token_choice
from moe_jax.routing.token_choice_rule import SECOND_POLICIES, SLOT_PRIORITIES

KEY = jax.random.key(11)
route = jax.jit(
  token_choice,
  static_argnames=(
    'num_selected',
    'capacity',
    'gates',
    'slot_priority',
    'second_policy',
    'second_threshold',
  ),
)


def logits_of(*probabilities):
  """Logits of one group, [1, S, E], whose softmax is the given rows."""
  with np.errstate(divide='ignore'):
    return jnp.asarray(np.log([probabilities]), jnp.float32)


def check(routing, *, expert, slot, kept, gate=None):
  """Compares the only group of a routing to arrays written by hand."""
  np.testing.assert_array_equal(routing.expert_index, [expert])
  np.testing.assert_array_equal(routing.kept, np.array([kept], bool))
  np.testing.assert_array_equal(routing.slot, [slot])
  if gate is not None:
    np.testing.assert_allclose(routing.gate, [gate], rtol=1e-5)


# Both tokens choose expert 1, which has one slot: the first token as its second
# choice, the second token as its first.
RIVALS = logits_of([0.6, 0.3, 0.1], [0.1, 0.7, 0.2])


def test_switch_drops_the_third_token_of_a_full_expert():
  # Tokens 0, 1 and 3 choose expert 1, which has two slots. Token 3 comes last
  # and is dropped; its gate is 0, and the other gates are the raw probability.
  routing = route(
    logits_of([0.2, 0.7, 0.1], [0.1, 0.5, 0.4], [0.8, 0.1, 0.1], [0, 0.9, 0.1]),
    num_selected=1,
    capacity=2,
  )
  check(
    routing,
    expert=[[1], [1], [0], [1]],
    slot=[[0], [1], [0], [2]],
    kept=[[1], [1], [1], [0]],
    gate=[[0.7], [0.5], [0.8], [0]],
  )


def test_gshard_serves_every_first_choice_before_any_second():
  # Token 1 arrives later, but its first choice beats token 0's second.
  routing = route(
    RIVALS,
    num_selected=2,
    capacity=1,
    slot_priority='choice_major',
    gates='renormalized',
  )
  check(
    routing,
    expert=[[0, 1], [1, 2]],
    slot=[[0, 1], [0, 0]],
    kept=[[1, 0], [1, 1]],
    gate=[[0.6 / 0.9, 0], [0.7 / 0.9, 0.2 / 0.9]],
  )


def test_token_major_serves_the_earlier_token_with_all_its_choices():
  routing = route(RIVALS, num_selected=2, capacity=1)
  check(
    routing,
    expert=[[0, 1], [1, 2]],
    slot=[[0, 0], [1, 0]],
    kept=[[1, 1], [0, 1]],
    gate=[[0.6, 0.3], [0, 0.2]],
  )


def test_batch_priority_serves_the_confident_token_first():
  # All choose expert 0. Token 1 has the largest probability, then token 2;
  # tokens 0 and 3 tie, so that the earlier goes first.
  routing = route(
    logits_of([0.5, 0.3, 0.2], [0.9, 0.1, 0], [0.6, 0.4, 0], [0.5, 0.3, 0.2]),
    num_selected=1,
    capacity=2,
    slot_priority='batch_priority',
  )
  check(
    routing,
    expert=[[0], [0], [0], [0]],
    slot=[[2], [0], [1], [3]],
    kept=[[0], [1], [1], [0]],
  )


def test_batch_priority_goes_by_the_largest_probability_not_the_chosen_ones():
  # A balancing bias sends both tokens to expert 1. Token 1 has the largest
  # probability, of another expert; the paper ranks tokens by it, so that token
  # 1 is served.
  routing = route(
    logits_of([0.4, 0.35, 0.25], [0.9, 0.06, 0.04]),
    num_selected=1,
    capacity=1,
    slot_priority='batch_priority',
    expert_index=jnp.array([[[1], [1]]], jnp.int32),
  )
  check(
    routing,
    expert=[[1], [1]],
    slot=[[1], [0]],
    kept=[[0], [1]],
    gate=[[0], [0.06]],
  )


# Both second choices are expert 2. Token 0's is hardly ever sent (2 * g2 ~
# 1e-17), and token 1's always (2 * g2 = 1 > any draw).
HALF_HEARTED = jnp.array([[[0.0, -80.0, -40.0], [-80.0, 0.0, 0.0]]])


def seconds(policy, key):
  return route(
    HALF_HEARTED, num_selected=2, capacity=1, second_policy=policy, key=key
  )


def test_gshards_draw_leaves_a_hole_in_the_queue():
  # Algorithm 1 counts a second choice that it does not send: that of token 0
  # keeps slot 0 of expert 2, which stays empty, and token 1 finds no slot.
  check(
    seconds('sampled', KEY),
    expert=[[0, 2], [1, 2]],
    slot=[[0, 0], [0, 1]],
    kept=[[1, 0], [1, 0]],
  )


def test_st_moes_threshold_leaves_no_hole():
  # Below the threshold a choice is sent by chance, and above it always; a
  # choice that is not sent takes no slot, so that token 1 has it.
  check(
    seconds('threshold', KEY),
    expert=[[0, 2], [1, 2]],
    slot=[[0, 0], [0, 0]],
    kept=[[1, 0], [1, 1]],
  )


@pytest.mark.parametrize('policy', SECOND_POLICIES)
def test_evaluation_sends_every_choice(policy):
  check(
    seconds(policy, None),
    expert=[[0, 2], [1, 2]],
    slot=[[0, 0], [0, 1]],
    kept=[[1, 1], [1, 0]],
  )


def test_mixtrals_gates_are_the_softmax_of_the_chosen_logits():
  logits = jnp.array([[[1.0, 3.0, 2.0], [0.5, 0.0, 0.25]]])
  routing = route(logits, num_selected=2, capacity=2, gates='renormalized')
  first = np.exp([3.0, 2.0]) / np.exp([3.0, 2.0]).sum()
  second = np.exp([0.5, 0.25]) / np.exp([0.5, 0.25]).sum()
  check(
    routing,
    expert=[[1, 2], [0, 2]],
    slot=[[0, 0], [0, 1]],
    kept=[[1, 1], [1, 1]],
    gate=[first, second],
  )


def test_renormalising_after_dropping_gives_the_survivor_everything():
  # Choices are those of GShard's test, but token 0's only kept choice has gate
  # 1. A third token, which finds experts 0 and 1 full, keeps nothing: its gates
  # are zero, not NaN.
  logits = jnp.concatenate([RIVALS, logits_of([0.5, 0.4, 0.1])], axis=1)
  routing = route(
    logits,
    num_selected=2,
    capacity=1,
    slot_priority='choice_major',
    gates='renormalized_after_drop',
  )
  check(
    routing,
    expert=[[0, 1], [1, 2], [0, 1]],
    slot=[[0, 1], [0, 0], [1, 2]],
    kept=[[1, 0], [1, 1], [0, 0]],
    gate=[[1, 0], [0.7 / 0.9, 0.2 / 0.9], [0, 0]],
  )


@pytest.mark.parametrize('slot_priority', SLOT_PRIORITIES)
def test_padding_takes_no_slot(slot_priority):
  # Token 0 is padding, with a larger probability than token 1, which gets its
  # slot.
  routing = route(
    logits_of([0.9, 0.1, 0], [0.6, 0.4, 0]),
    num_selected=1,
    capacity=1,
    mask=jnp.array([[False, True]]),
    slot_priority=slot_priority,
  )
  check(
    routing,
    expert=[[0], [0]],
    slot=[[0], [0]],
    kept=[[0], [1]],
    gate=[[0], [0.6]],
  )


def test_ties_go_to_the_lower_expert():
  # Two experts tie for the first place, and two for the third.
  tied = np.tile(np.float32([0, 2, 1, 1, 2]), (1, 3, 1))
  chosen = route(jnp.asarray(tied), num_selected=3, capacity=2)
  np.testing.assert_array_equal(chosen.expert_index[0, 0], [1, 4, 2])


def test_gates_are_float32_whatever_the_logits_are():
  half = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(jnp.bfloat16)
  from_half, exact = (
    route(jnp.asarray(logits), num_selected=3, capacity=4)
    for logits in (half, half.astype(np.float32))
  )
  assert from_half.gate.dtype == jnp.float32
  np.testing.assert_array_equal(from_half.gate, exact.gate)


def test_zeros_of_both_signs_tie():
  # Logits are equal: the lower expert is chosen, whichever of them is -0.
  for row in ([-0.0, 0.0], [0.0, -0.0]):
    routing = route(jnp.array([[row]]), num_selected=1, capacity=1)
    check(routing, expert=[[0]], slot=[[0]], kept=[[1]])
