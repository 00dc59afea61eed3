"""The token in each row of the experts, for both kinds of routing.

A dispatcher puts tokens for the experts into rows: `[E, R]`, R for each expert,
or `[N]`, sorted by expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.shapes import Array, Bool, Float, Float32, Int32, Leaf, Shaped

# The name under which a remat policy finds the routers' decisions.
DECISION = 'routing'


class Rows(NamedTuple):
  """The token and the choice in each row, and the row of each choice.

  A choice is one of a token's K where tokens choose experts, and a slot of an
  expert where experts choose tokens.

  Attributes:
    token: int32 [*R], the token in each row, counted over the G * S tokens of
      all groups; G * S in an empty row.
    choice: int32 [*R], the choice in each row, counted over the choices of
      `gate`; the number of choices in an empty row. None: row i has choice i.
    row: int32, of the shape of `gate`, the row of each choice, counted over all
      rows; the number of rows for a choice that has none. None: choice i has
      row i.
    gate: float32, the weight of each choice: [N, K] where tokens choose, [P]
      for the P slots where experts choose.
    num_tokens: N = G * S, the number of tokens.
  """

  token: Array
  choice: Array | None
  row: Array | None
  gate: Array
  num_tokens: int

  @property
  def by_token(self) -> bool:
    """Whether tokens choose, so that each has K choices with a row or none."""
    return self.gate.ndim == 2


def decided(index: Leaf) -> Leaf:
  """Names a router's decision, an array of integers, for a remat policy.

  It is worth saving: it is small, and to compute it again takes a top-K or a
  sort.
  """
  return checkpoint_name(index, DECISION)


def without_nan(
  mask: Bool[Array, '*G'], x: Float[Array, '*G M']
) -> Float[Array, '*G M']:
  """x, with zeros for NaN and infinities where the mask is False.

  It stands before products, not behind them: a NaN or an infinity of a token
  that is padding would reach the gradients of kernels as 0 * NaN. Finite
  numbers stay, so that outputs at padding are the same as without a mask.
  """
  return _without_nan(mask, x)


@jax.custom_jvp
def _without_nan(mask, x):
  return jnp.where(mask[..., None] | jnp.isfinite(x), x, 0)


@_without_nan.defjvp
def _without_nan_jvp(primals, tangents):
  # The gradient at padding is zero anyway, and a selection would keep a mask as
  # large as x for the backward pass.
  return _without_nan(*primals), tangents[1]


@jax.named_scope('index')
def rows_of_choices(
  expert_index: Int32[Array, 'G S K'],
  slot: Int32[Array, 'G S K'],
  gate: Float32[Array, 'G S K'],
  kept: Bool[Array, 'G S K'],
  num_experts: int,
  capacity: int,
) -> Rows:
  """The rows [E, R] of slots, R = G * C: group after group for each expert."""
  G, S, K = gate.shape
  E, C = num_experts, capacity
  group = jnp.arange(G, dtype=jnp.int32)[:, None, None]
  row = (expert_index * G + group) * C + slot
  row = jnp.where(kept, row, E * G * C).reshape(G * S, K)
  choice = jnp.arange(G * S * K, dtype=jnp.int32)
  empty = jnp.full(E * G * C, G * S * K, jnp.int32)
  placed = empty.at[row.reshape(-1)].set(choice, mode='drop')
  choice = decided(placed.reshape(E, G * C))
  return Rows(choice // K, choice, row, gate.reshape(G * S, K), G * S)


@jax.named_scope('index')
def sorted_rows_of_choices(
  expert_index: Int32[Array, 'G S K'],
  gate: Float32[Array, 'G S K'],
  kept: Bool[Array, 'G S K'],
  num_experts: int,
  capacity: int | None,
) -> Rows:
  """The rows [N] sorted by expert, in the order of the tokens for each.

  N is the most there can be, min(G * S * K, E * G * C); rows past the choices
  that are kept are empty.
  """
  G, S, K = gate.shape
  E, choices = num_experts, G * S * K
  N = choices
  if capacity is not None:
    N = min(choices, E * G * capacity)
  expert = jnp.where(kept, expert_index, E).reshape(-1)
  choice = stable_argsort(expert, E + 1)[:N]
  served = jnp.arange(N, dtype=jnp.int32) < kept.sum()
  choice = decided(jnp.where(served, choice, choices))
  number = jnp.arange(N, dtype=jnp.int32)
  row = jnp.full(choices, N, jnp.int32)
  row = decided(row.at[choice].set(number, mode='drop').reshape(G * S, K))
  return Rows(choice // K, choice, row, gate.reshape(G * S, K), G * S)


@jax.named_scope('index')
def rows_of_slots(
  token_index: Int32[Array, 'G E C'],
  gate: Float32[Array, 'G E C'],
  group_size: int,
) -> Rows:
  """The rows [E, R] of slots, R = G * C: group after group for each expert."""
  G, S = len(token_index), group_size
  first = S * jnp.arange(G, dtype=jnp.int32)[:, None, None]
  token = jnp.where(token_index < S, first + token_index, G * S)
  gate = _by_expert(gate).reshape(-1)
  return Rows(_by_expert(token), None, None, gate, G * S)


def sorted_rows_of_slots(
  token_index: Int32[Array, 'G E C'],
  gate: Float32[Array, 'G E C'],
  group_size: int,
) -> Rows:
  """The rows [N] sorted by expert, N = E * G * C; empty rows are last."""
  slots = rows_of_slots(token_index, gate, group_size)
  with jax.named_scope('index'):
    N, no_token = slots.token.size, slots.num_tokens
    filled = slots.token.reshape(-1) < no_token
    row = jnp.where(filled, jnp.cumsum(filled, dtype=jnp.int32) - 1, N)
    slot = jnp.arange(N, dtype=jnp.int32)
    slot = jnp.full(N, N, jnp.int32).at[row].set(slot, mode='drop')
    row, slot = decided(row), decided(slot)
    token = jnp.append(slots.token, jnp.int32(no_token))[slot]
  return Rows(decided(token), slot, row, slots.gate, no_token)


def _by_expert(x: Shaped[Array, 'G E C']) -> Shaped[Array, 'E R']:
  """The slots of each expert in one line, group after group."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def stable_argsort(
  key: Int32[Array, ' N'], num_keys: int
) -> Int32[Array, ' N']:
  """The order that sorts keys in [0, num_keys); equal keys keep their order."""
  N = key.shape[0]
  number = jnp.arange(N, dtype=jnp.int32)
  if num_keys * N <= np.iinfo(np.int32).max:
    # One array sorts several times as fast as a pair.
    return jnp.sort(key * N + number) % N
  return jax.lax.sort((key, number), num_keys=1, is_stable=True)[1]
