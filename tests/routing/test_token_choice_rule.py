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
    'num_selected', 'capacity', 'gates', 'slot_priority', 'second_policy',
  ),
)  # fmt: skip


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
TWO = dict(num_selected=2, capacity=1)
BY_RANK = dict(slot_priority='choice_major')
# Both second choices are expert 2. Token 0's is hardly ever sent (2 * g2 ~
# 1e-17), and token 1's always (2 * g2 = 1 > any draw).
HALF_HEARTED = jnp.array([[[0.0, -80.0, -40.0], [-80.0, 0.0, 0.0]]])
SECONDS = [[0, 2], [1, 2]]


def softmax(*logits):
  return np.exp(logits) / np.exp(logits).sum()


# Logits, options, and the arrays by hand.
TOLD = {
  # Tokens 0, 1 and 3 choose expert 1, which has two slots. Token 3 comes last
  # and is dropped; its gate is 0, and the other gates are the raw probability.
  'Switch drops the third token of a full expert': (
    logits_of([0.2, 0.7, 0.1], [0.1, 0.5, 0.4], [0.8, 0.1, 0.1], [0, 0.9, 0.1]),
    dict(num_selected=1, capacity=2),
    dict(
      expert=[[1], [1], [0], [1]], slot=[[0], [1], [0], [2]],
      kept=[[1], [1], [1], [0]], gate=[[0.7], [0.5], [0.8], [0]],
    ),
  ),
  # Token 1 arrives later, but its first choice beats token 0's second.
  'GShard serves every first choice before any second': (
    RIVALS, TWO | BY_RANK | dict(gates='renormalized'),
    dict(
      expert=[[0, 1], [1, 2]], slot=[[0, 1], [0, 0]], kept=[[1, 0], [1, 1]],
      gate=[[0.6 / 0.9, 0], [0.7 / 0.9, 0.2 / 0.9]],
    ),
  ),
  'token-major serves the earlier token with all its choices': (
    RIVALS, TWO,
    dict(
      expert=[[0, 1], [1, 2]], slot=[[0, 0], [1, 0]], kept=[[1, 1], [0, 1]],
      gate=[[0.6, 0.3], [0, 0.2]],
    ),
  ),
  # All choose expert 0. Token 1 has the largest probability, then token 2;
  # tokens 0 and 3 tie, so that the earlier goes first.
  'batch priority serves the confident token first': (
    logits_of([0.5, 0.3, 0.2], [0.9, 0.1, 0], [0.6, 0.4, 0], [0.5, 0.3, 0.2]),
    dict(num_selected=1, capacity=2, slot_priority='batch_priority'),
    dict(
      expert=[[0]] * 4, slot=[[2], [0], [1], [3]], kept=[[0], [1], [1], [0]],
    ),
  ),
  # Algorithm 1 counts a second choice that it does not send: that of token 0
  # keeps slot 0 of expert 2, which stays empty, and token 1 finds no slot.
  "GShard's draw leaves a hole in the queue": (
    HALF_HEARTED, TWO | dict(second_policy='sampled', key=KEY),
    dict(expert=SECONDS, slot=[[0, 0], [0, 1]], kept=[[1, 0], [1, 0]]),
  ),
  # Below the threshold a choice is sent by chance, and above it always; a
  # choice that is not sent takes no slot, so that token 1 has it.
  "ST-MoE's threshold leaves no hole": (
    HALF_HEARTED, TWO | dict(second_policy='threshold', key=KEY),
    dict(expert=SECONDS, slot=[[0, 0], [0, 0]], kept=[[1, 0], [1, 1]]),
  ),
  **{
    f'evaluation sends every choice: {policy}': (
      HALF_HEARTED, TWO | dict(second_policy=policy),
      dict(expert=SECONDS, slot=[[0, 0], [0, 1]], kept=[[1, 1], [1, 0]]),
    )
    for policy in SECOND_POLICIES
  },
  "Mixtral's gates are the softmax of the chosen logits": (
    jnp.array([[[1.0, 3.0, 2.0], [0.5, 0.0, 0.25]]]),
    dict(num_selected=2, capacity=2, gates='renormalized'),
    dict(
      expert=[[1, 2], [0, 2]], slot=[[0, 0], [0, 1]], kept=[[1, 1], [1, 1]],
      gate=[softmax(3.0, 2.0), softmax(0.5, 0.25)],
    ),
  ),
  # Choices are those of GShard's row, but token 0's only kept choice has gate
  # 1. A third token, which finds experts 0 and 1 full, keeps nothing: its gates
  # are zero, not NaN.
  'renormalising after dropping gives the survivor everything': (
    jnp.concatenate([RIVALS, logits_of([0.5, 0.4, 0.1])], axis=1),
    TWO | BY_RANK | dict(gates='renormalized_after_drop'),
    dict(
      expert=[[0, 1], [1, 2], [0, 1]], slot=[[0, 1], [0, 0], [1, 2]],
      kept=[[1, 0], [1, 1], [0, 0]],
      gate=[[1, 0], [0.7 / 0.9, 0.2 / 0.9], [0, 0]],
    ),
  ),
  # Token 0 is padding, with a larger probability than token 1, which gets its
  # slot.
  **{
    f'padding takes no slot: {priority}': (
      logits_of([0.9, 0.1, 0], [0.6, 0.4, 0]),
      dict(
        num_selected=1, capacity=1, mask=jnp.array([[False, True]]),
        slot_priority=priority,
      ),
      dict(
        expert=[[0], [0]], slot=[[0], [0]], kept=[[0], [1]], gate=[[0], [0.6]],
      ),
    )
    for priority in SLOT_PRIORITIES
  },
}  # fmt: skip


@pytest.mark.parametrize('story', TOLD)
def test_told(story):
  logits, options, expected = TOLD[story]
  check(route(logits, **options), **expected)


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
