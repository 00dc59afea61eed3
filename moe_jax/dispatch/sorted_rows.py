"""Dispatch without slots: rows sorted by expert, as many as each has.

MegaBlocks, https://arxiv.org/abs/2211.15841. No expert has a capacity of its
own; what the routing kept is all moved, so a routing with room for everyone
drops nothing. The rows go to the products of `moe_jax.kernels`. How they move,
and their gradients, is `permute.py`, and where experts choose `slot_rows.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.dispatch import slot_rows
from moe_jax.dispatch.permute import take_rows, take_tokens
from moe_jax.routing.assignments import Routing, SlotRouting, decided
from moe_jax.shapes import Array, Float, Int32


def dispatch(
  x: Float[Array, 'G S M'], routing: Routing | SlotRouting
) -> Float[Array, 'N M']:
  """Tokens to rows: expert 0's first, in the order of the tokens, and so on.

  N is the most there can be, min(G * S * K, E * G * C); rows past the sum of
  `group_sizes` are zero. Where experts choose, N = E * G * C, and an expert's
  rows are in the order of its slots.
  """
  G, S, M = x.shape
  x = x.reshape(G * S, M)
  if isinstance(routing, SlotRouting):
    return slot_rows.take_tokens(x, slot_rows.packed(routing).token_index)
  return take_tokens(x, *_indices(routing))


def combine(
  rows: Float[Array, 'N M'], routing: Routing | SlotRouting
) -> Float[Array, 'G S M']:
  """Expert rows back to tokens, weighted by the gates, summed over choices."""
  if isinstance(routing, SlotRouting):
    order = slot_rows.packed(routing)
    G, S = len(routing.gate), routing.group_size
    y = slot_rows.sum_rows(rows, order.gate, order.token_index, G * S)
    return y.reshape(G, S, -1)
  G, S, K = routing.gate.shape
  gate = routing.gate.reshape(G * S, K)
  y = take_rows(rows, gate, *_indices(routing))
  return y.reshape(G, S, -1)


@jax.named_scope('index')
def group_sizes(routing: Routing | SlotRouting) -> Int32[Array, ' E']:
  """The rows of each expert: its choices that are kept, of all groups."""
  if isinstance(routing, SlotRouting):
    return decided(routing.filled.sum((0, 2), dtype=jnp.int32))
  E = routing.num_experts
  expert = jnp.where(routing.kept, routing.expert_index, E).reshape(-1)
  return decided(jnp.zeros(E, jnp.int32).at[expert].add(1, mode='drop'))


@jax.named_scope('index')
def _indices(
  routing: Routing,
) -> tuple[Int32[Array, ' N'], Int32[Array, 'P K']]:
  """The choice in each row and the row of each choice, as `permute` counts."""
  G, S, K = routing.gate.shape
  E, choices = routing.num_experts, G * S * K
  N = choices
  if routing.capacity is not None:
    N = min(choices, E * G * routing.capacity)
  expert = jnp.where(routing.kept, routing.expert_index, E).reshape(-1)
  choice_index = _stable_argsort(expert, E + 1)[:N]
  served = jnp.arange(N, dtype=jnp.int32) < routing.kept.sum()
  choice_index = decided(jnp.where(served, choice_index, choices))
  row = jnp.arange(N, dtype=jnp.int32)
  row_index = jnp.full(choices, N, jnp.int32)
  row_index = row_index.at[choice_index].set(row, mode='drop')
  return choice_index, decided(row_index.reshape(G * S, K))


def _stable_argsort(
  key: Int32[Array, ' N'], num_keys: int
) -> Int32[Array, ' N']:
  """The order that sorts keys in [0, num_keys), equal ones as they stand."""
  N = key.shape[0]
  place = jnp.arange(N, dtype=jnp.int32)
  if num_keys * N <= np.iinfo(np.int32).max:
    # One array sorts several times as fast as a pair.
    return jnp.sort(key * N + place) % N
  return jax.lax.sort((key, place), num_keys=1, is_stable=True)[1]
