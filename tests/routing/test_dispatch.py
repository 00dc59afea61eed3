"""Every dispatcher equals the loops that define it, on the same routings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.routing import Routing, token_choice
from moe_jax.routing.dispatch import slot_rows
from tests import reference
from tests.routing.movers import (
  MOVERS,
  WITH_SLOTS,
  both_directions,
)

G, S, E, K, C, M = 2, 7, 5, 3, 4, 6
every_dispatcher = pytest.mark.parametrize('name', MOVERS)
with_slots = pytest.mark.parametrize('name', WITH_SLOTS)


def arrays(seed, dtype=jnp.float32, capacity=C):
  """Random tokens and their gradient [G, S, M], rows and theirs [E, R, M]."""
  rng = np.random.default_rng(seed)
  shapes = [(G, S, M)] * 2 + [(E, G * capacity, M)] * 2
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


route = jax.jit(token_choice, static_argnames=('num_selected', 'capacity'))


def routed(mask=None, capacity=C, K=K):
  logits = np.random.default_rng(7).normal(size=(G, S, E))
  logits -= np.arange(E)  # the first experts are in demand
  return route(
    logits.astype(np.float32),
    num_selected=K,
    mask=np.ones((G, S), bool) if mask is None else mask,
    capacity=capacity,
  )


def by_hand(seed):
  """A random legal routing, more general than those of a router.

  Its slots have holes, values are arbitrary where nothing is kept, and gates
  have any sign and size.
  """
  rng = np.random.default_rng(seed)
  expert = rng.integers(0, E, (G, S, K))
  slot = rng.integers(0, 3 * C, (G, S, K))
  kept = np.zeros((G, S, K), bool)
  for g in range(G):
    seats = rng.permutation(E * C)[: rng.integers(0, min(S * K, E * C) + 1)]
    for choice, seat in zip(rng.permutation(S * K), seats):
      s, k = divmod(choice, K)
      expert[g, s, k], slot[g, s, k] = divmod(seat, C)
      kept[g, s, k] = True
  gate = np.where(kept, rng.normal(size=(G, S, K)), 0.0)
  return Routing(
    jnp.asarray(expert, jnp.int32),
    jnp.asarray(slot, jnp.int32),
    jnp.asarray(gate, jnp.float32),
    jnp.asarray(kept),
    E,
    C,
  )


HALF = np.arange(S) < np.array([[6], [5]])
# Two programs of each dispatcher run all of them: of three choices, of which
# there are more than slots, and of one choice, of which there are fewer.
SCENARIOS = {
  'drops': routed,
  'padding': lambda: routed(mask=HALF),
  'nothing but padding': lambda: routed(mask=np.zeros((G, S), bool)),
  'written by hand': lambda: by_hand(0),
  'one choice': lambda: routed(K=1, capacity=2),
}


def test_the_scenarios_are_what_they_say():
  kept = {name: np.asarray(make().kept) for name, make in SCENARIOS.items()}
  assert not kept['nothing but padding'].any()
  assert not kept['padding'][~HALF].any()
  for name in ('drops', 'padding', 'written by hand', 'one choice'):
    real = HALF if name == 'padding' else np.ones((G, S), bool)
    assert kept[name].any() and not kept[name][real].all(), name
  assert G * S * K > G * E * C and G * S < G * E * 2


def jitted(name, routing, *case):
  return both_directions(name, routing, reference.slot_of_row(routing), *case)


def by_loops(routing, x, dy, rows, d_rows):
  x, dy, rows, d_rows = (
    np.asarray(a, np.float64) for a in (x, dy, rows, d_rows)
  )
  return (
    reference.dispatch(x, routing),
    reference.dispatch_gradient(d_rows, routing),
    reference.combine(rows, routing),
    *reference.combine_gradient(dy, rows, routing),
  )


def compare(name, actual, expected, **tolerance):
  part_names = ('rows', 'gradient by x', 'y', 'gradient by rows', 'by gates')
  for part, a, b in zip(part_names, actual, expected, strict=True):
    np.testing.assert_allclose(
      np.asarray(a, np.float64), b, err_msg=f'{part} of {name}', **tolerance
    )


@with_slots
def test_three_tokens_by_hand(name):
  # Two experts have two slots each. Token 0 goes to both, token 1 only to
  # expert 0, and token 2 nowhere: expert 0 was full when it came.
  routing = Routing(
    expert_index=jnp.array([[[0, 1], [0, 1], [0, 1]]], jnp.int32),
    slot=jnp.array([[[0, 0], [1, 0], [2, 0]]], jnp.int32),
    gate=jnp.array([[[0.75, 0.25], [0.5, 0.0], [0.0, 0.0]]]),
    kept=jnp.array([[[True, True], [True, False], [False, False]]]),
    num_experts=2,
    capacity=2,
  )
  x = jnp.array([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]])
  dispatcher = MOVERS[name]
  rows = np.asarray(jax.jit(dispatcher.dispatch)(x, routing))
  np.testing.assert_array_equal(
    rows,
    [
      [[1, 2, 3], [4, 5, 6]],
      [[1, 2, 3], [0, 0, 0]],
    ],
  )
  # Expert 0 multiplies its rows by 10, expert 1 by 100.
  factors = np.float32([[[10.0]], [[100.0]]])
  y = np.asarray(jax.jit(dispatcher.combine)(rows * factors, routing))
  first = np.array([1, 2, 3]) * (0.75 * 10 + 0.25 * 100)
  second = np.array([4, 5, 6]) * (0.5 * 10)
  np.testing.assert_allclose(y[0], [first, second, [0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize('scenario', SCENARIOS)
def test_rows_outputs_and_gradients(scenario):
  routing = SCENARIOS[scenario]()
  case = arrays(1, capacity=routing.capacity)
  expected = by_loops(routing, *case)
  for name in MOVERS:
    compare(name, jitted(name, routing, *case), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_any_legal_routing(seed):
  routing, case = by_hand(seed), arrays(seed)
  expected = by_loops(routing, *case)
  for name in MOVERS:
    compare(name, jitted(name, routing, *case), expected, rtol=1e-5, atol=1e-5)


@every_dispatcher
def test_bfloat16_stays_bfloat16(name):
  routing, case = routed(), arrays(4, jnp.bfloat16)
  actual = jitted(name, routing, *case)
  dtypes = [x.dtype for x in actual]
  assert dtypes == [jnp.bfloat16] * 4 + [jnp.float32]  # gates keep float32
  # bfloat16 has eight bits of mantissa, and sums have up to six terms.
  compare(name, actual, by_loops(routing, *case), rtol=0.02, atol=0.04)
  np.testing.assert_array_equal(actual[0], reference.dispatch(case[0], routing))


@every_dispatcher
def test_a_dropped_token_gives_exactly_zero_and_an_empty_slot_is_zero(name):
  routing = SCENARIOS['one choice']()
  kept = np.asarray(routing.kept)
  dropped, filled = ~kept.any(-1), kept.sum()
  assert dropped.any() and filled < E * G * 2
  x, _, rows, _ = arrays(5, capacity=2)
  actual = jitted(name, routing, x, x, rows, rows)
  sent, _, y, d_rows, _ = (np.asarray(part) for part in actual)
  assert not y[dropped].any() and y[~dropped].any(-1).all()
  assert sent.any(-1).sum() == d_rows.any(-1).sum() == filled


@every_dispatcher
def test_a_gate_of_zero_still_sends_the_token_and_still_learns(name):
  # Whether a choice is served depends on `kept`, not on `gate > 0`: the expert
  # gets the token, and the gate has a gradient.
  routing = by_hand(1)
  assert np.any(routing.kept)
  gate = np.zeros((G, S, K), np.float32)
  routing = dataclasses.replace(routing, gate=jnp.asarray(gate))
  case = arrays(7)
  sent, _, y, _, d_gate = jitted(name, routing, *case)
  np.testing.assert_allclose(sent, reference.dispatch(case[0], routing))
  assert not np.any(y)
  np.testing.assert_array_equal(np.asarray(d_gate) != 0, routing.kept)


def test_a_routing_knows_the_token_in_each_slot():
  routing = by_hand(2)
  slot, expert = np.asarray(routing.slot), np.asarray(routing.expert_index)
  expected = np.full((E, G * C), G * S)
  for g, s, k in zip(*np.nonzero(routing.kept)):
    expected[expert[g, s, k], g * C + slot[g, s, k]] = g * S + s
  token = jax.jit(lambda routing: slot_rows(routing).token)(routing)
  np.testing.assert_array_equal(token, expected)


@with_slots
def test_refuses_an_unbounded_routing(name):
  routing = routed(capacity=None)
  x, _, rows, _ = arrays(11)
  dispatcher = MOVERS[name]
  with pytest.raises(ValueError, match=r'capacity=None.*All'):
    dispatcher.dispatch(x, routing)
  with pytest.raises(ValueError, match=r'capacity=None.*All'):
    dispatcher.combine(rows, routing)
