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
from moe_jax.routing import rows
from moe_jax.routing.capacity import check_capacity
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
    """The array type of each field; see `shape_checks.HasShapes`."""
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
    return rows.decided(count)

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

  def slot_rows(self) -> rows.Rows:
    """The rows [E, G * C] of slots; raises ValueError without a capacity."""
    return rows.rows_of_choices(
      self.expert_index,
      self.slot,
      self.gate,
      self.kept,
      self.num_experts,
      self.bounded(),
    )

  def sorted_rows(self) -> rows.Rows:
    """The rows [N] sorted by expert, without empty ones between them."""
    return rows.sorted_rows_of_choices(
      self.expert_index,
      self.gate,
      self.kept,
      self.num_experts,
      self.capacity,
    )

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
    """The array type of each field; see `shape_checks.HasShapes`."""
    return {
      'token_index': Int[Array, 'G E C'],
      'gate': Float[Array, 'G E C'],
    }

  def static_sizes(self) -> dict[str, int]:
    """S, which no array tells; see `shape_checks.HasShapes`."""
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
    return rows.decided(self.filled.sum((0, 2), dtype=jnp.int32))

  def of_experts(
    self, number: Int32[Array, ' E'], num_experts: int
  ) -> 'SlotRouting':
    """See `Routing.of_experts`."""
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

  def slot_rows(self) -> rows.Rows:
    """The rows [E, G * C] of slots."""
    return rows.rows_of_slots(self.token_index, self.gate, self.group_size)

  def sorted_rows(self) -> rows.Rows:
    """The rows [N] sorted by expert, without empty ones between them."""
    return rows.sorted_rows_of_slots(
      self.token_index, self.gate, self.group_size
    )


# Routings that move whole tokens, each to experts of its own or to slots.
TokenRouting = Routing | SlotRouting
