"""Dispatch by index into static capacity buffers: the default, O(S K M).

A slot holds at most one token and a choice at most one slot, so both
directions, and both gradients, are gathers; none is a scatter-add. The only
scatter is of integers: token numbers into slots.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.base import Routing
from moe_jax.shapes import Array, Float, Int32


def token_index(routing: Routing) -> Int32[Array, 'E R']:
  """The token in each slot, counted over G * S; G * S where it is empty."""
  return _choice_index(routing) // routing.gate.shape[-1]


def dispatch(
  x: Float[Array, 'G S M'], routing: Routing
) -> Float[Array, 'E R M']:
  """Tokens to expert rows; R = G * C, empty slots are zero."""
  G, S, M = x.shape
  choice_index = _choice_index(routing)  # [E, R]
  slot_index = _slot_index(routing)  # [G*S, K]
  return _take_tokens(x.reshape(G * S, M), choice_index, slot_index)


def combine(
  rows: Float[Array, 'E R M'], routing: Routing
) -> Float[Array, 'G S M']:
  """Expert rows back to tokens, weighted by the gates, summed over choices."""
  G, S, K = routing.gate.shape
  choice_index = _choice_index(routing)
  slot_index = _slot_index(routing)
  gate = routing.gate.reshape(G * S, K)
  y = _take_rows(rows, gate, choice_index, slot_index)
  return y.reshape(G, S, -1)


def _slot_index(routing: Routing) -> Int32[Array, 'N K']:
  """The row of each choice, counted over E * R; E * R if it is not kept."""
  G, S, K = routing.gate.shape
  E, C = routing.num_experts, _capacity(routing)
  group = jnp.arange(G, dtype=jnp.int32)[:, None, None]
  row = (routing.expert_index * G + group) * C + routing.slot
  return jnp.where(routing.kept, row, E * G * C).reshape(G * S, K)


def _choice_index(routing: Routing) -> Int32[Array, 'E R']:
  """The choice in each slot, counted over G * S * K; G * S * K if empty."""
  G, S, K = routing.gate.shape
  E, R = routing.num_experts, G * _capacity(routing)
  choice = jnp.arange(G * S * K, dtype=jnp.int32)
  empty = jnp.full(E * R, G * S * K, jnp.int32)
  row = _slot_index(routing).reshape(-1)
  return empty.at[row].set(choice, mode='drop').reshape(E, R)


def _capacity(routing: Routing) -> int:
  if routing.capacity is None:
    raise ValueError(
      "capacity=None: gather needs a capacity; use capacity_rule='all'"
    )
  return routing.capacity


def _take(x: Float[Array, 'N M'], index: Int32[Array, '*R']):
  """x[index], zero where index is N."""
  # A zero row behind the others: cheaper than mode='fill', which selects.
  x = jnp.concatenate([x, jnp.zeros_like(x[:1])])
  return jnp.take(x, index, axis=0, mode='clip')


@jax.custom_vjp
def _take_tokens(x, choice_index, slot_index):
  return _take(x, choice_index // slot_index.shape[-1])


def _take_tokens_fwd(x, choice_index, slot_index):
  return _take_tokens(x, choice_index, slot_index), slot_index


def _take_tokens_bwd(slot_index, d_rows):
  d_rows = d_rows.reshape(-1, d_rows.shape[-1])  # [E*R, M]
  return _take(d_rows, slot_index).sum(-2), None, None


_take_tokens.defvjp(_take_tokens_fwd, _take_tokens_bwd)


@jax.custom_vjp
def _take_rows(rows, gate, choice_index, slot_index):
  flat = rows.reshape(-1, rows.shape[-1])  # [E*R, M]
  taken = _take(flat, slot_index)  # [N, K, M]
  return (gate[..., None].astype(rows.dtype) * taken).sum(-2)


def _take_rows_fwd(rows, gate, choice_index, slot_index):
  y = _take_rows(rows, gate, choice_index, slot_index)
  return y, (rows, gate, choice_index, slot_index)


def _take_rows_bwd(saved, dy):
  rows, gate, choice_index, slot_index = saved
  flat = rows.reshape(-1, rows.shape[-1])
  d_gate = jnp.einsum(
    'NKM,NM->NK',
    _take(flat, slot_index),
    dy,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  row_gate = _take(gate.reshape(-1, 1), choice_index)  # [E, R, 1]
  d_rows = row_gate.astype(dy.dtype) * _take(dy, choice_index // gate.shape[-1])
  return d_rows, d_gate.astype(gate.dtype), None, None


_take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)
