"""Dispatchers equal the loops that define them when experts choose tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

from moe_jax.routing import Routing, expert_choice
from tests import reference
from tests.routing.movers import MOVERS, both_directions, group_sizes

G, S, E, C, M = 2, 7, 5, 4, 6
every_dispatcher = pytest.mark.parametrize('name', MOVERS)


def by_hand(seed):
  """A random legal routing: slots have holes, gates any sign, some are zero."""
  rng = np.random.default_rng(seed)
  index = [[rng.permutation(S)[:C] for _ in range(E)] for _ in range(G)]
  index = np.where(rng.random((G, E, C)) < 0.3, S, index)
  gate = rng.normal(size=index.shape) * (rng.random(index.shape) < 0.8)
  return Routing.of_slots(
    jnp.asarray(index, jnp.int32),
    jnp.asarray(np.where(index < S, gate, 0), jnp.float32),
    S,
  )


def arrays(seed, dtype=jnp.float32):
  """Random tokens and their gradient [G, S, M], rows and theirs [E, R, M]."""
  rng = np.random.default_rng(seed)
  shapes = [(G, S, M)] * 2 + [(E, G * C, M)] * 2
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def slot_of_row(routing):
  """The filled slots' indices in [E, G, C], in the order of sorted rows."""
  filled = np.asarray(routing.kept).swapaxes(0, 1).reshape(-1)
  slots = np.flatnonzero(filled)
  empty = [filled.size] * (filled.size - len(slots))
  return np.append(slots, empty).astype(np.int32)


def check(routing, case, names=tuple(MOVERS), **tolerance):
  """Compares dispatchers with the loops; returns the results of the last."""
  slots, routing_case = slot_of_row(routing), case
  case = [np.asarray(a, np.float64) for a in case]
  expected = reference.slots_gradients(routing, *case)
  # The gradient of an empty slot's gate is arbitrary.
  part_names = ('rows', 'gradient by x', 'y', 'gradient by rows', 'by gates')
  for name in names:
    actual = both_directions(name, routing, slots, *routing_case)
    for part, a, b in zip(part_names, actual, expected, strict=True):
      a = np.asarray(a, np.float64)
      message = f'{part} of {name}'
      np.testing.assert_allclose(a, b, err_msg=message, **tolerance)
  return actual


@every_dispatcher
def test_three_tokens_by_hand(name):
  # Expert 0 takes tokens 2 and 0; expert 1 takes only token 2, in its second
  # slot; no expert takes token 1.
  routing = Routing.of_slots(
    token_index=jnp.array([[[2, 0], [3, 2]]], jnp.int32),
    gate=jnp.array([[[0.75, 0.5], [0.0, 0.25]]]),
    group_size=3,
  )
  x = jnp.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
  mover = MOVERS[name]
  rows = np.asarray(jax.jit(mover.dispatch)(x, routing))
  # Expert 0 multiplies by 10, expert 1 by 100.
  if (sizes := group_sizes(name, routing)) is None:
    np.testing.assert_array_equal(rows, [[[5, 6], [1, 2]], [[0, 0], [5, 6]]])
    rows = rows * np.float32([[[10.0]], [[100.0]]])
  else:
    np.testing.assert_array_equal(sizes, [2, 1])
    np.testing.assert_array_equal(rows, [[5, 6], [1, 2], [5, 6], [0, 0]])
    rows = rows * np.float32([[10.0], [10.0], [100.0], [7.0]])
  y = np.asarray(jax.jit(mover.combine)(rows, routing))
  third = np.array([5, 6]) * (0.75 * 10 + 0.25 * 100)
  np.testing.assert_allclose(y[0], [[5, 10], [0, 0], third], rtol=1e-6)


def test_what_expert_choice_makes():
  logits = 2 * np.random.default_rng(0).normal(size=(G, S, E))
  mask = np.arange(S) < np.array([[5], [S]])
  route = jax.jit(functools.partial(expert_choice, capacity=C))
  routing = route(logits.astype(np.float32), mask=mask)
  assert not np.all(routing.kept)
  check(routing, arrays(1), rtol=1e-5, atol=1e-6)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_any_legal_routing(seed):
  check(by_hand(seed), arrays(seed), rtol=1e-5, atol=1e-5)


@every_dispatcher
def test_bfloat16_stays_bfloat16(name):
  case = arrays(4, jnp.bfloat16)
  actual = check(by_hand(5), case, [name], rtol=0.02, atol=0.04)
  assert [a.dtype for a in actual] == [jnp.bfloat16] * 4 + [jnp.float32]


@pytest.mark.parametrize('name', ['gather', 'sorted_rows'])
def test_nothing_grows_with_the_experts_but_what_the_rows_do(name):
  # E * C is equal for few experts and for many, and so is the size of the
  # largest array.
  def largest(E):
    routing = Routing.of_slots(
      jnp.zeros((G, E, 64 // E), jnp.int32), jnp.zeros((G, E, 64 // E)), 33
    )
    mover = MOVERS[name]

    def loss(x, gate):
      chosen = dataclasses.replace(routing, gate=gate)
      return mover.combine(mover.dispatch(x, chosen) ** 2, chosen).sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(
      jnp.zeros((G, 33, M)), routing.gate
    )
    return max(sizes_of(program.jaxpr))

  assert largest(2) == largest(64) == (G * 64 * M)


def sizes_of(jaxpr):
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for inner in core.jaxprs_in_params(equation.params):
      yield from sizes_of(inner)
