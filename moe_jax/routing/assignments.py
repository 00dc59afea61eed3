"""The contract between routers and dispatchers: two views of a routing.

A router turns logits into one `Routing`, or, where experts choose tokens, one
`SlotRouting`. Both offer the same methods, so that no dispatcher asks which it
has.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.routing.capacity import check_capacity
from moe_jax.routing.rows import Rows, decided, stable_argsort
from moe_jax.shapes import Array, Bool, Float, Float32, Int, Int32, Leaf


class TokenChoices(NamedTuple):
  """The choices of each token, whoever made them.

  Attributes:
    expert: int32 [G, S, N], the number of the expert; -1 where there is none.
    gate: float32 [G, S, N], the weight of its output; 0 where not kept.
    kept: bool [G, S, N], whether the choice is served.
  """

  expert: Leaf
  gate: Leaf
  kept: Leaf


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['expert_index', 'slot', 'gate', 'kept'],
  meta_fields=['num_experts', 'capacity'],
)
@dataclasses.dataclass(frozen=True)
class Routing:
  """The expert and the slot of each choice of each token, in index form.

  Attributes:
    expert_index: int32 [G, S, K], in [0, E), also where nothing is kept.
    slot: int32 [G, S, K], the number of choices before this one in its
      expert's queue. A choice that never queued (padding, a second choice that
      was not sent) has 0.
    gate: float32 [G, S, K], the weight of the expert's output; 0 where the
      choice is not kept.
    kept: bool [G, S, K], whether the choice is served. A served choice has
      slot < capacity, and no two served choices of a group share an expert
      and a slot.
    num_experts: E, the number of experts.
    capacity: C, the slots of an expert in each group; None for no bound.
  """

  expert_index: Leaf
  slot: Leaf
  gate: Leaf
  kept: Leaf
  num_experts: int
  capacity: int | None

  def shape_hints(self) -> dict[str, Any]:
    """The array type of each field; see `HasShapes`."""
    return {
      'expert_index': Int[Array, 'G S K'],
      'slot': Int[Array, 'G S K'],
      'gate': Float[Array, 'G S K'],
      'kept': Bool[Array, 'G S K'],
    }

  def static_sizes(self) -> dict[str, int]:
    """E, which no array tells; raises ValueError for a bad capacity."""
    check_capacity(self.capacity)
    return {'E': self.num_experts}

  @property
  def group_size(self) -> int:
    """S, the number of tokens in a group."""
    return self.gate.shape[1]

  def slot_mask(self) -> Bool[Array, 'G S E C']:
    """Whether each token sits in each slot of each expert."""
    return self._choice_mask().any(2)

  def slot_shares(self) -> Bool[Array, 'G S E C']:
    """The part of each token in each slot: all of it or nothing."""
    return self.slot_mask()

  def slot_weights(self) -> Float32[Array, 'G S E C']:
    """The gate of each token in each slot; 0 where it is not in the slot."""
    return jnp.where(self._choice_mask(), self.gate[..., None, None], 0.0).sum(
      2
    )

  def token_gates(self) -> Float32[Array, 'G S E']:
    """Each expert's gate for each token; 0 for a token it does not serve."""
    chosen = jax.nn.one_hot(self.expert_index, self.num_experts)
    gate = jnp.where(self.kept, self.gate, 0.0)
    return (chosen * gate[..., None]).sum(-2)

  def by_token(self, mask: Bool[Array, 'G S']) -> TokenChoices:
    """The K choices of each token that the mask has; others have none."""
    expert = jnp.where(mask[..., None], self.expert_index, -1)
    gate = jnp.where(self.kept, self.gate, 0.0)
    return TokenChoices(expert, gate, self.kept)

  @jax.named_scope('index')
  def rows_per_expert(self) -> Int32[Array, ' E']:
    """The number of choices that each expert serves, over all groups."""
    E = self.num_experts
    expert = jnp.where(self.kept, self.expert_index, E).reshape(-1)
    count = jnp.zeros(E, jnp.int32).at[expert].add(1, mode='drop')
    return decided(count)

  def of_experts(
    self, number: Int32[Array, ' E'], num_experts: int
  ) -> 'Routing':
    """The choices of some experts alone, which get new numbers.

    Args:
      number: The new number of each expert; `num_experts` or more for experts
        whose choices are left out. No two of the others have the same one.
      num_experts: The number of experts of the result.
    """
    index = number[self.expert_index]
    kept = self.kept & (index < num_experts)
    return dataclasses.replace(
      self,
      expert_index=jnp.where(kept, index, 0),
      gate=jnp.where(kept, self.gate, 0.0),
      kept=kept,
      num_experts=num_experts,
    )

  @jax.named_scope('index')
  def slot_rows(self) -> Rows:
    """The rows [E, R] of slots, R = G * C: group after group for each expert.

    Raises:
      ValueError: There is no capacity.
    """
    G, S, K = self.gate.shape
    E, C = self.num_experts, self.bounded()
    group = jnp.arange(G, dtype=jnp.int32)[:, None, None]
    row = (self.expert_index * G + group) * C + self.slot
    row = jnp.where(self.kept, row, E * G * C).reshape(G * S, K)
    choice = jnp.arange(G * S * K, dtype=jnp.int32)
    empty = jnp.full(E * G * C, G * S * K, jnp.int32)
    placed = empty.at[row.reshape(-1)].set(choice, mode='drop')
    choice = decided(placed.reshape(E, G * C))
    return Rows(choice // K, choice, row, self.gate.reshape(G * S, K), G * S)

  @jax.named_scope('index')
  def sorted_rows(self) -> Rows:
    """The rows [N] sorted by expert, in the order of the tokens for each.

    N is the most there can be, min(G * S * K, E * G * C); rows past the choices
    that are kept are empty.
    """
    G, S, K = self.gate.shape
    E, choices = self.num_experts, G * S * K
    N = choices
    if self.capacity is not None:
      N = min(choices, E * G * self.capacity)
    expert = jnp.where(self.kept, self.expert_index, E)
    choice = stable_argsort(expert.reshape(-1), E + 1)[:N]
    served = jnp.arange(N, dtype=jnp.int32) < self.kept.sum()
    choice = decided(jnp.where(served, choice, choices))
    number = jnp.arange(N, dtype=jnp.int32)
    row = jnp.full(choices, N, jnp.int32)
    row = decided(row.at[choice].set(number, mode='drop').reshape(G * S, K))
    return Rows(choice // K, choice, row, self.gate.reshape(G * S, K), G * S)

  def _choice_mask(self) -> Bool[Array, 'G S K E C']:
    expert = jax.nn.one_hot(
      self.expert_index, self.num_experts, dtype=jnp.bool_
    )
    slot = jax.nn.one_hot(self.slot, self.bounded(), dtype=jnp.bool_)
    kept = self.kept[..., None, None]
    return expert[..., None] & slot[..., None, :] & kept

  def bounded(self) -> int:
    """The capacity; raises ValueError where there is none."""
    if self.capacity is None:
      raise InputError(
        'capacity=None: slots need a capacity; use the capacity rule All()'
      )
    return self.capacity


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['token_index', 'gate'],
  meta_fields=['group_size'],
)
@dataclasses.dataclass(frozen=True)
class SlotRouting:
  """The token in each slot of each expert: a routing where experts choose.

  A token may be in the slots of any number of experts, in one of each. The
  methods are those of `Routing`.

  Attributes:
    token_index: int32 [G, E, C], in [0, S); S where the slot is empty.
    gate: float32 [G, E, C], the weight of the expert's output; 0 where empty.
    group_size: S, the number of tokens in a group.
  """

  token_index: Leaf
  gate: Leaf
  group_size: int

  def shape_hints(self) -> dict[str, Any]:
    """The array type of each field; see `HasShapes`."""
    return {
      'token_index': Int[Array, 'G E C'],
      'gate': Float[Array, 'G E C'],
    }

  def static_sizes(self) -> dict[str, int]:
    """S, which no array tells; see `HasShapes`."""
    return {'S': self.group_size}

  @property
  def num_experts(self) -> int:
    """E, the number of experts."""
    return self.gate.shape[1]

  @property
  def capacity(self) -> int:
    """C, the number of slots of an expert in each group."""
    return self.gate.shape[2]

  @property
  def filled(self) -> Leaf:
    """Bool [G, E, C], whether a token sits in the slot."""
    return self.token_index < self.group_size

  def slot_mask(self) -> Bool[Array, 'G S E C']:
    """Whether each token sits in each slot of each expert."""
    # The index S of an empty slot is past the end, and its one-hot all False.
    S = self.group_size
    return jax.nn.one_hot(self.token_index, S, dtype=jnp.bool_, axis=1)

  def slot_shares(self) -> Bool[Array, 'G S E C']:
    """The part of each token in each slot: all of it or nothing."""
    return self.slot_mask()

  def slot_weights(self) -> Float32[Array, 'G S E C']:
    """The gate of each token in each slot; 0 where it is not in the slot."""
    return jnp.where(self.slot_mask(), self.gate[:, None], 0.0)

  def token_gates(self) -> Float32[Array, 'G S E']:
    """Each expert's gate for each token; 0 for a token it does not serve."""
    return self.slot_weights().sum(-1)

  def by_token(self, mask: Bool[Array, 'G S']) -> TokenChoices:
    """Each token with all E experts, -1 for those that did not take it."""
    (G, E, _), S = self.token_index.shape, self.group_size
    groups, experts = jnp.arange(G)[:, None, None], jnp.arange(E)[:, None]
    indices = (groups, self.token_index, experts)
    gate = jnp.zeros((G, S, E)).at[indices].set(self.gate, mode='drop')
    kept = jnp.zeros((G, S, E), bool).at[indices].set(True, mode='drop')
    kept &= mask[..., None]
    expert = jnp.where(kept, jnp.arange(E, dtype=jnp.int32), -1)
    return TokenChoices(expert, jnp.where(kept, gate, 0.0), kept)

  @jax.named_scope('index')
  def rows_per_expert(self) -> Int32[Array, ' E']:
    """The number of tokens that each expert serves, over all groups."""
    return decided(self.filled.sum((0, 2), dtype=jnp.int32))

  def of_experts(
    self, number: Int32[Array, ' E'], num_experts: int
  ) -> 'SlotRouting':
    """The slots of some experts alone, numbered as in `Routing.of_experts`."""
    E = self.num_experts
    source = jnp.full(num_experts, E, jnp.int32)
    source = source.at[number].set(jnp.arange(E, dtype=jnp.int32), mode='drop')

    def take_experts(x, fill):
      return jnp.take(x, source, axis=1, mode='fill', fill_value=fill)

    return dataclasses.replace(
      self,
      token_index=take_experts(self.token_index, self.group_size),
      gate=take_experts(self.gate, 0.0),
    )

  @jax.named_scope('index')
  def slot_rows(self) -> Rows:
    """The rows [E, R] of slots, R = G * C, by group for each expert."""
    (G, E, _), S = self.token_index.shape, self.group_size
    first = S * jnp.arange(G, dtype=jnp.int32)[:, None, None]
    token = jnp.where(self.token_index < S, first + self.token_index, G * S)
    token = token.swapaxes(0, 1).reshape(E, -1)
    gate = self.gate.swapaxes(0, 1).reshape(-1)
    return Rows(token, None, None, gate, G * S)

  def sorted_rows(self) -> Rows:
    """The rows [N] sorted by expert, N = E * G * C; empty rows are last."""
    slots = self.slot_rows()
    with jax.named_scope('index'):
      N, no_token = slots.token.size, slots.num_tokens
      filled = slots.token.reshape(-1) < no_token
      row = jnp.where(filled, jnp.cumsum(filled, dtype=jnp.int32) - 1, N)
      slot = jnp.arange(N, dtype=jnp.int32)
      slot = jnp.full(N, N, jnp.int32).at[row].set(slot, mode='drop')
      row, slot = decided(row), decided(slot)
      token = jnp.append(slots.token, jnp.int32(no_token))[slot]
    return Rows(decided(token), slot, row, slots.gate, no_token)


# Routings that move whole tokens, each to experts of its own or to slots.
TokenRouting = Routing | SlotRouting
