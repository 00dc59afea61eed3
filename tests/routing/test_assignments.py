"""A routing has the same contents, whether tokens or experts choose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import Routing, token_choice
from moe_jax.routing.dispatch import rows_by_expert, slot_rows

G, S, E, K, C = 2, 7, 5, 3, 4


route = jax.jit(token_choice, static_argnames=('num_selected', 'capacity'))


@functools.cache
def by_token(capacity=C):
  """Token choice with drops and padding."""
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(G, S, E)), jnp.float32)
  mask = jnp.asarray(rng.random((G, S)) < 0.8)
  return route(logits, num_selected=K, capacity=capacity, mask=mask)


def by_slot(routing):
  """The same routing seen from the slots, computed in loops."""
  token = np.full((G, E, C), S)
  gate = np.zeros((G, E, C), np.float32)
  routing = jax.tree.map(np.asarray, routing)
  for g, s, k in np.argwhere(routing.kept):
    e, c = routing.expert_index[g, s, k], routing.slot[g, s, k]
    token[g, e, c], gate[g, e, c] = s, routing.gate[g, s, k]
  return Routing.of_slots(jnp.asarray(token, jnp.int32), jnp.asarray(gate), S)


def test_both_views_answer_alike():
  routing = by_token()
  assert np.any(routing.kept) and not np.all(routing.kept)
  slots = by_slot(routing)
  for name in ('num_experts', 'capacity', 'group_size'):
    assert getattr(routing, name) == getattr(slots, name)
  names = 'slot_shares', 'slot_weights', 'token_gates', 'rows_per_expert'
  calls = jax.jit(lambda view: {name: getattr(view, name)() for name in names})
  token_view, slot_view = calls(routing), calls(slots)
  for name in names:
    np.testing.assert_array_equal(
      token_view[name], slot_view[name], err_msg=name
    )
  for rows_of in (slot_rows, rows_by_expert):
    one, other = rows_of(routing), rows_of(slots)
    assert (one.row.shape, other.row.shape) == ((G * S, K), (G * E * C,))
    served = np.sum(routing.kept)
    rows, others = np.asarray(one.token), np.asarray(other.token)
    if rows_of is slot_rows:
      assert rows.shape == others.shape == (E, G * C)
      np.testing.assert_array_equal(rows, others)
    else:  # Rows without any token are last, and their numbers differ.
      assert rows.shape == (min(G * S * K, E * G * C),)
      np.testing.assert_array_equal(np.sort(rows[:served] < G * S), True)
      assert (rows[served:] == G * S).all() and (others[served:] == G * S).all()
      begin = 0
      for count in np.asarray(token_view['rows_per_expert']):
        span = slice(begin, begin + count)
        assert sorted(rows[span]) == sorted(others[span])
        begin += count


def test_choices_by_token():
  # Token 0 chooses experts 2 and 0; expert 0 drops token 1; token 2 is padding.
  index = jnp.asarray([[[2, 0], [0, 1], [1, 2]]], jnp.int32)
  kept = jnp.asarray([[[True, True], [False, True], [False, False]]])
  gate = jnp.asarray([[[0.6, 0.4], [0.7, 0.3], [0.5, 0.5]]], jnp.float32)
  routing = Routing(index, jnp.zeros_like(index), gate, kept, 3, 1)
  chosen = routing.by_token(jnp.asarray([[True, True, False]]))
  assert chosen.expert[0].tolist() == [[2, 0], [0, 1], [-1, -1]]
  np.testing.assert_array_equal(chosen.kept, kept)
  expected = np.float32([[0.6, 0.4], [0, 0.3], [0, 0]])
  np.testing.assert_array_equal(chosen.gate[0], expected)
  # Expert 1 takes tokens 2 and 0, expert 0 token 0; slots of 3 are empty.
  slots = Routing.of_slots(
    jnp.asarray([[[0, 3], [2, 0]]], jnp.int32),
    jnp.asarray([[[0.2, 0], [0.3, 0.4]]], jnp.float32),
    3,
  )
  chosen = slots.by_token(jnp.ones((1, 3), bool))
  assert chosen.expert[0].tolist() == [[0, 1], [-1, -1], [-1, 1]]
  np.testing.assert_array_equal(chosen.kept, chosen.expert >= 0)
  expected = np.float32([[0.2, 0.4], [0, 0], [0, 0.3]])
  np.testing.assert_array_equal(chosen.gate[0], expected)


@pytest.mark.parametrize(
  'ask', [Routing.slot_shares, Routing.slot_weights, slot_rows]
)
def test_unbounded_experts_have_no_slots(ask):
  with pytest.raises(ValueError, match=r'capacity=None.*All\(\)'):
    ask(by_token(capacity=None))
