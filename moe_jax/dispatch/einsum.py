"""One-hot dispatch, as GShard prints it: the readable reference.

https://arxiv.org/abs/2006.16668, section 3.2. It costs O(S E C M) per group,
which grows with the square of the group size; use it to check the others.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.assignments import Routing, SlotRouting
from moe_jax.shapes import Array, Bool, Float


def dispatch_mask(routing: Routing) -> Bool[Array, 'G S K E C']:
  """True where choice k of token s is served in slot c of expert e.

  Raises:
    ValueError: The routing is unbounded: a mask needs a capacity.
  """
  if routing.capacity is None:
    raise ValueError(
      "capacity=None: einsum needs a capacity; use capacity_rule='all'"
    )
  expert = jax.nn.one_hot(
    routing.expert_index, routing.num_experts, dtype=jnp.bool_
  )
  slot = jax.nn.one_hot(routing.slot, routing.capacity, dtype=jnp.bool_)
  kept = routing.kept[..., None, None]
  return expert[..., None] & slot[..., None, :] & kept


def slot_mask(routing: SlotRouting) -> Bool[Array, 'G S E C']:
  """True where token s is in slot c of expert e."""
  # The index S of an empty slot is past the end, and its one-hot all False.
  S = routing.group_size
  return jax.nn.one_hot(routing.token_index, S, dtype=jnp.bool_, axis=1)


def dispatch(
  x: Float[Array, 'G S M'], routing: Routing | SlotRouting
) -> Float[Array, 'E R M']:
  """Tokens to expert rows; R = G * C, empty slots are zero."""
  G, _, M = x.shape
  if isinstance(routing, SlotRouting):
    send = slot_mask(routing)
  else:
    send = dispatch_mask(routing).any(2)
  rows = jnp.einsum('GSEC,GSM->EGCM', send.astype(x.dtype), x)
  return rows.reshape(routing.num_experts, G * routing.capacity, M)


def combine(
  rows: Float[Array, 'E R M'], routing: Routing | SlotRouting
) -> Float[Array, 'G S M']:
  """Expert rows back to tokens, weighted by the gates, summed over choices."""
  G, E, C = routing.gate.shape[0], routing.num_experts, routing.capacity
  if isinstance(routing, SlotRouting):
    weight = jnp.where(slot_mask(routing), routing.gate[:, None], 0.0)
  else:
    mask = dispatch_mask(routing)
    weight = jnp.where(mask, routing.gate[..., None, None], 0.0).sum(2)
  rows = rows.reshape(E, G, C, -1)
  return jnp.einsum('GSEC,EGCM->GSM', weight.astype(rows.dtype), rows)


def group_sizes(routing: Routing | SlotRouting) -> None:
  """None: every expert has R rows."""
