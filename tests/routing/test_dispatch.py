"""Every dispatcher equals the loops that define it, on the same routings.

A routing is seen from tokens, which choose experts, or from the slots of
experts, which choose tokens: both views go through the same tests.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

from moe_jax.routing import Routing, expert_choice, token_choice
from moe_jax.routing.dispatch import einsum, gather, rows_by_expert, sorted_rows
from tests import reference

MOVERS = {'einsum': einsum, 'gather': gather, 'sorted_rows': sorted_rows}
G, S, E, K, C, M = 2, 7, 5, 3, 4, 6
every_dispatcher = pytest.mark.parametrize('name', MOVERS)


def group_sizes(name, routing):
  """Number of rows of each expert, or None if every expert has R rows."""
  return routing.rows_per_expert() if name == 'sorted_rows' else None


@functools.partial(jax.jit, static_argnums=0)
def both_directions(name, routing, slot_of_row, x, dy, rows, d_rows):
  """Both directions of one dispatcher, with all gradients.

  The caller's rows are [E, R, M] with every dispatcher; `slot_of_row` gives the
  place among them of each row of the sorted ones.
  """
  mover = MOVERS[name]
  slotted = group_sizes(name, routing) is None

  def send(x):
    sent = mover.dispatch(x, routing)
    if slotted:
      return sent
    num_experts, num_rows, width = rows.shape
    slots = jnp.zeros((num_experts * num_rows, width), sent.dtype)
    return slots.at[slot_of_row].set(sent, mode='drop').reshape(rows.shape)

  def combine(rows, gate):
    if not slotted:
      flat = rows.reshape(-1, rows.shape[-1])
      rows = jnp.take(flat, slot_of_row, 0, mode='fill', fill_value=0)
    return mover.combine(rows, dataclasses.replace(routing, gate=gate))

  sent, dispatch_vjp = jax.vjp(send, x)
  y, combine_vjp = jax.vjp(combine, rows, routing.gate)
  return sent, dispatch_vjp(d_rows)[0], y, *combine_vjp(dy)


def arrays(seed, dtype=jnp.float32, capacity=C):
  """Random tokens and their gradient [G, S, M], rows and theirs [E, R, M]."""
  rng = np.random.default_rng(seed)
  shapes = [(G, S, M)] * 2 + [(E, G * capacity, M)] * 2
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


choose = jax.jit(token_choice, static_argnames=('num_selected', 'capacity'))


def routed(mask=None, capacity=C, K=K, skew=1.0):
  logits = np.random.default_rng(7).normal(size=(G, S, E))
  logits -= skew * np.arange(E)  # the first experts are in demand
  return choose(
    logits.astype(np.float32),
    num_selected=K,
    mask=np.ones((G, S), bool) if mask is None else mask,
    capacity=capacity,
  )


def of_tokens(seed):
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
  expert, slot = (jnp.asarray(x, jnp.int32) for x in (expert, slot))
  return Routing(
    expert, slot, jnp.asarray(gate, jnp.float32), jnp.asarray(kept), E, C
  )


def of_slots(seed):
  """A random legal routing whose slots have holes, and some gates are zero."""
  rng = np.random.default_rng(seed)
  index = [[rng.permutation(S)[:C] for _ in range(E)] for _ in range(G)]
  index = np.where(rng.random((G, E, C)) < 0.3, S, index)
  gate = rng.normal(size=index.shape) * (rng.random(index.shape) < 0.8)
  return Routing.of_slots(
    jnp.asarray(index, jnp.int32),
    jnp.asarray(np.where(index < S, gate, 0), jnp.float32),
    S,
  )


VIEWS = {'tokens': of_tokens, 'slots': of_slots}
HALF = np.arange(S) < np.array([[6], [5]])


def chosen_by_experts():
  logits = 2 * np.random.default_rng(0).normal(size=(G, S, E))
  route = jax.jit(functools.partial(expert_choice, capacity=C))
  return route(logits.astype(np.float32), mask=HALF)


# Choices are more than slots with K = 3, and fewer with one choice.
SCENARIOS = {
  'drops': routed,
  'padding': lambda: routed(mask=HALF),
  'nothing but padding': lambda: routed(mask=np.zeros((G, S), bool)),
  'one choice': lambda: routed(K=1, capacity=2),
  'experts choose': chosen_by_experts,
}


def is_of_slots(routing):
  return routing.gate.shape[1] == routing.num_experts


def slot_of_row(routing):
  """The filled slots' indices in [E, G, C], in the order of sorted rows."""
  if not is_of_slots(routing):
    return reference.slot_of_row(routing)
  filled = np.asarray(routing.kept).swapaxes(0, 1).reshape(-1)
  slots = np.flatnonzero(filled)
  empty = [filled.size] * (filled.size - len(slots))
  return np.append(slots, empty).astype(np.int32)


def by_loops(routing, x, dy, rows, d_rows):
  x, dy, rows, d_rows = case = [
    np.asarray(a, np.float64) for a in (x, dy, rows, d_rows)
  ]
  if is_of_slots(routing):
    return reference.slots_gradients(routing, *case)
  return (
    reference.dispatch(x, routing),
    reference.dispatch_gradient(d_rows, routing),
    reference.combine(rows, routing),
    *reference.combine_gradient(dy, rows, routing),
  )


def check(routing, case, rtol=1e-5, atol=1e-5):
  """Compares dispatchers with the loops; yields the results of each."""
  expected = by_loops(routing, *case)
  part_names = ('rows', 'gradient by x', 'y', 'gradient by rows', 'by gates')
  for name in MOVERS:
    actual = both_directions(name, routing, slot_of_row(routing), *case)
    for part, a, b in zip(part_names, actual, expected, strict=True):
      np.testing.assert_allclose(
        np.asarray(a, np.float64), b, rtol, atol, err_msg=f'{part} of {name}'
      )
    yield [np.asarray(part) for part in actual]


@pytest.mark.parametrize('view', VIEWS)
@every_dispatcher
def test_three_tokens_by_hand(name, view):
  # Two experts have two slots each. Token 0 goes to both, token 1 only to
  # expert 0, and token 2 nowhere: expert 0 was full when it came.
  routing = Routing(
    expert_index=jnp.array([[[1, 0], [0, 1], [0, 1]]], jnp.int32),
    slot=jnp.array([[[0, 0], [1, 0], [2, 0]]], jnp.int32),
    gate=jnp.array([[[0.25, 0.75], [0.5, 0.0], [0.0, 0.0]]]),
    kept=jnp.array([[[True, True], [True, False], [False, False]]]),
    num_experts=2,
    capacity=2,
  )
  rows_of_slots = [[[1, 2], [3, 4]], [[1, 2], [0, 0]]]
  expected = [[32.5, 65], [15, 20], [0, 0]]
  if view == 'slots':
    # Expert 0 takes tokens 2 and 0; expert 1 takes only token 2, in its second
    # slot; no expert takes token 1.
    routing = Routing.of_slots(
      token_index=jnp.array([[[2, 0], [3, 2]]], jnp.int32),
      gate=jnp.array([[[0.75, 0.5], [0.0, 0.25]]]),
      group_size=3,
    )
    rows_of_slots = [[[5, 6], [1, 2]], [[0, 0], [5, 6]]]
    expected = [[5, 10], [0, 0], [5 * 32.5, 6 * 32.5]]
  x = jnp.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
  mover = MOVERS[name]
  rows = np.asarray(jax.jit(mover.dispatch)(x, routing))
  # Expert 0 multiplies by 10, expert 1 by 100.
  if (sizes := group_sizes(name, routing)) is None:
    np.testing.assert_array_equal(rows, rows_of_slots)
    rows = rows * np.float32([[[10.0]], [[100.0]]])
  else:
    # The row of the empty slot is the last.
    filled = [row for expert in rows_of_slots for row in expert if any(row)]
    np.testing.assert_array_equal(sizes, [2, 1])
    np.testing.assert_array_equal(rows, [*filled, [0, 0]])
    rows = rows * np.float32([[10.0], [10.0], [100.0], [7.0]])
  y = np.asarray(jax.jit(mover.combine)(rows, routing))
  np.testing.assert_allclose(y[0], expected, rtol=1e-6)


@pytest.mark.parametrize('scenario', SCENARIOS)
def test_rows_outputs_and_gradients(scenario):
  routing = SCENARIOS[scenario]()
  kept = np.asarray(routing.kept)
  assert not kept.all() and kept.any() == (scenario != 'nothing but padding')
  for sent, d_x, y, d_rows, _ in check(
    routing, arrays(1, capacity=routing.capacity)
  ):
    if not is_of_slots(routing):
      # A dropped token gives exactly zero, and an empty slot is zero.
      served = kept.any(-1)
      assert not y[~served].any() and not d_x[~served].any()
      assert y[served].any(-1).all()
    assert sent.any(-1).sum() == d_rows.any(-1).sum() == kept.sum()


@pytest.mark.parametrize('view', VIEWS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_any_legal_routing(view, seed):
  for _ in check(VIEWS[view](seed), arrays(seed)):
    pass


@pytest.mark.parametrize('view', VIEWS)
def test_bfloat16_stays_bfloat16(view):
  routing, case = VIEWS[view](5), arrays(4, jnp.bfloat16)
  # bfloat16 has eight bits of mantissa, and sums have up to six terms.
  for actual in check(routing, case, rtol=0.02, atol=0.04):
    dtypes = [x.dtype for x in actual]
    assert dtypes == [jnp.bfloat16] * 4 + [jnp.float32]  # gates keep float32


@pytest.mark.as_users_compile
def test_a_gate_of_zero_still_sends_the_token_and_still_learns():
  # Whether a choice is served depends on `kept`, not on `gate > 0`: the expert
  # gets the token, and the gate has a gradient.
  routing = of_tokens(1)
  gate = jnp.zeros((G, S, K))
  for sent, _, y, _, d_gate in check(
    dataclasses.replace(routing, gate=gate), arrays(7)
  ):
    assert sent.any() and not np.any(y)
    np.testing.assert_array_equal(np.asarray(d_gate) != 0, routing.kept)


# Tests of experts without a bound follow, whose rows are sorted.


def sorted_trip(x, routing):
  rows = sorted_rows.dispatch(x, routing)
  return rows, routing.rows_per_expert(), sorted_rows.combine(rows, routing)


@pytest.mark.parametrize('skew', [0.0, 30.0])
def test_experts_without_a_bound_take_all_choices_in_order(skew):
  # With the larger skew every token chooses experts 0, 1 and 2.
  routing = routed(capacity=None, skew=skew)
  x = np.asarray(arrays(1)[0])
  rows, sizes, y = jax.jit(sorted_trip)(x, routing)
  expert, gate = np.asarray(routing.expert_index), np.asarray(routing.gate)
  order = np.argsort(expert.ravel(), kind='stable')
  np.testing.assert_array_equal(rows, x.reshape(-1, M)[order // K])
  np.testing.assert_array_equal(sizes, np.bincount(expert.ravel(), minlength=E))
  np.testing.assert_allclose(y, x * gate.sum(-1, keepdims=True), rtol=1e-5)


def test_what_is_not_kept_is_not_sent():
  routing = routed(capacity=None)
  kept, x = np.array(routing.kept), np.ones((G, S, M), np.float32)
  kept[0, 3], x[0, 3] = False, np.nan
  routing = dataclasses.replace(routing, kept=jnp.asarray(kept))
  rows, sizes, _ = jax.jit(sorted_trip)(x, routing)
  assert np.isfinite(rows).all() and np.sum(sizes) == 42 - 3


def test_rows_of_very_many_experts_are_in_the_order_of_the_tokens():
  # The product of the largest expert's number and 40 tokens exceeds int32, in
  # which the usual sort key is computed.
  num_experts = 2**27 - 1
  low = np.random.default_rng(0).integers(0, 5, 40)
  expert = np.where(low % 2, num_experts - 1 - low, low).astype(np.int32)
  index, zeros = jnp.asarray(expert).reshape(1, 40, 1), jnp.zeros((1, 40, 1))
  routing = Routing(
    index, zeros.astype(jnp.int32), zeros, zeros == 0, num_experts, None
  )
  order = np.argsort(expert, kind='stable')
  np.testing.assert_array_equal(rows_by_expert(routing).token, order)


# Tests of programs follow.


def test_gates_that_lost_every_choice_have_no_nan_on_the_way():
  # With `jax_debug_nans` on, no NaN may occur even in between.
  def gates(logits):
    return token_choice(
      logits, num_selected=2, capacity=1, gates='renormalized_after_drop'
    ).gate.max()

  with jax.debug_nans(True):
    jax.grad(gates)(jnp.zeros((G, S, E)))


def gradients_program(name, routing, x):
  """The jaxpr of the gradients of a dispatcher by tokens and by gates."""

  def loss(x, gate):
    chosen = dataclasses.replace(routing, gate=gate)
    mover = MOVERS[name]
    return (mover.combine(mover.dispatch(x, chosen) ** 2, chosen)).sum()

  return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, routing.gate)


@pytest.mark.parametrize('name', ['gather', 'sorted_rows'])
def test_no_gradient_is_added_by_scatter(name):
  # A scatter-add of floats is slow on accelerators, and not reproducible on
  # some: no gradient may use one.
  program = str(gradients_program(name, routed(K=2, capacity=2), arrays(1)[0]))
  assert 'gather' in program and not re.search(
    r':f32\[[^=]*= scatter-add', program
  )


@pytest.mark.parametrize('name', ['gather', 'sorted_rows'])
def test_nothing_grows_with_the_experts_but_what_the_rows_do(name):
  # E * C is equal for few experts and for many, and so is the size of the
  # largest array.
  def largest(E):
    index = jnp.zeros((G, E, 64 // E), jnp.int32)
    routing = Routing.of_slots(index, index.astype(jnp.float32), 33)
    program = gradients_program(name, routing, jnp.zeros((G, 33, M)))
    return max(sizes_of(program.jaxpr))

  assert largest(2) == largest(64) == (G * 64 * M)


def sizes_of(jaxpr):
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for inner in core.jaxprs_in_params(equation.params):
      yield from sizes_of(inner)
