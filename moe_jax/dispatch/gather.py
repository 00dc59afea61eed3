"""Dispatch by index into static capacity buffers: the default, O(S K M).

Every expert has C rows a group, filled or not; choices beyond are dropped.
How rows move, and their gradients, is `permute.py`, and where experts choose
`slot_rows.py`.
"""

import jax
import jax.numpy as jnp

from moe_jax.dispatch import slot_rows
from moe_jax.dispatch.permute import take_rows, take_tokens
from moe_jax.routing.assignments import Routing, SlotRouting, decided
from moe_jax.shapes import Array, Float, Int32


def token_index(routing: Routing | SlotRouting) -> Int32[Array, 'E R']:
  """The token in each slot, counted over G * S; G * S where it is empty."""
  if isinstance(routing, SlotRouting):
    return slot_rows.token_index(routing)
  return _choice_index(routing) // routing.gate.shape[-1]


def dispatch(
  x: Float[Array, 'G S M'], routing: Routing | SlotRouting
) -> Float[Array, 'E R M']:
  """Tokens to expert rows; R = G * C, empty slots are zero."""
  G, S, M = x.shape
  x = x.reshape(G * S, M)
  if isinstance(routing, SlotRouting):
    return slot_rows.take_tokens(x, token_index(routing))
  return take_tokens(x, _choice_index(routing), _row_index(routing))


def combine(
  rows: Float[Array, 'E R M'], routing: Routing | SlotRouting
) -> Float[Array, 'G S M']:
  """Expert rows back to tokens, weighted by the gates, summed over choices."""
  if isinstance(routing, SlotRouting):
    gate, token = slot_rows.by_expert(routing.gate), token_index(routing)
    G, S = len(routing.gate), routing.group_size
    return slot_rows.sum_rows(rows, gate, token, G * S).reshape(G, S, -1)
  G, S, K = routing.gate.shape
  gate = routing.gate.reshape(G * S, K)
  y = take_rows(rows, gate, _choice_index(routing), _row_index(routing))
  return y.reshape(G, S, -1)


def group_sizes(routing: Routing | SlotRouting) -> None:
  """None: every expert has R rows."""


@jax.named_scope('index')
def _row_index(routing: Routing) -> Int32[Array, 'N K']:
  """The row of each choice, counted over E * R; E * R if it is not kept."""
  G, S, K = routing.gate.shape
  E, C = routing.num_experts, _capacity(routing)
  group = jnp.arange(G, dtype=jnp.int32)[:, None, None]
  row = (routing.expert_index * G + group) * C + routing.slot
  return jnp.where(routing.kept, row, E * G * C).reshape(G * S, K)


@jax.named_scope('index')
def _choice_index(routing: Routing) -> Int32[Array, 'E R']:
  """The choice in each slot, counted over G * S * K; G * S * K if empty."""
  G, S, K = routing.gate.shape
  E, R = routing.num_experts, G * _capacity(routing)
  choice = jnp.arange(G * S * K, dtype=jnp.int32)
  empty = jnp.full(E * R, G * S * K, jnp.int32)
  row = _row_index(routing).reshape(-1)
  return decided(empty.at[row].set(choice, mode='drop').reshape(E, R))


def _capacity(routing: Routing) -> int:
  if routing.capacity is None:
    raise ValueError(
      "capacity=None: gather needs a capacity; use capacity_rule='all'"
    )
  return routing.capacity
