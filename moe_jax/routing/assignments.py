"""The contract between routers and dispatchers: the class `Routing`.

A `Routing` is a list of choices. It has the same fields whether tokens chose
experts or experts chose tokens, so that a dispatcher treats both alike.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.routing.capacity import check_capacity
from moe_jax.routing.rows import decided
from moe_jax.shapes import Array, Bool, Float, Float32, Int, Int32, Leaf


class TokenChoices(NamedTuple):
  """The experts of each token, whether tokens or experts made the choice.

  N is K where tokens choose, and E where experts choose.

  Attributes:
    expert: int32 [G, S, N], the index of the expert; -1 where there is none.
    gate: float32 [G, S, N], the weight of the expert's output; 0 where the
      choice is not kept.
    kept: bool [G, S, N], whether the choice is served.
  """

  expert: Leaf
  gate: Leaf
  kept: Leaf


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['expert_index', 'slot', 'gate', 'kept', 'token_index'],
  meta_fields=['num_experts', 'capacity', 'num_tokens'],
)
@dataclasses.dataclass(frozen=True)
class Routing:
  """The expert, the slot and the gate of each choice, in index form.

  Where tokens choose, the choices are [G, S, K], the K of each token. Where
  experts choose, they are [G, E, C], one for each slot: `of_slots` makes such a
  routing, in which a token may have any number of experts.

  Attributes:
    expert_index: int32, the index of the expert, in [0, E), also of a choice
      that is not kept.
    slot: int32, the number of choices before this one in its expert's queue; 0
      for a choice that does not queue: one of padding, or one that the second
      policy 'threshold' of `token_choice` did not send.
    gate: float32, the weight of the expert's output; 0 where the choice is not
      kept.
    kept: bool, whether the choice is served. A served choice has slot <
      capacity, and no two served choices of a group share an expert and a slot.
    num_experts: E, the number of experts.
    capacity: C, the slots of an expert in each group; None for no bound.
    token_index: int32 [G, E, C], the token in each slot, where experts choose;
      None where tokens choose, as the position of a choice tells its token.
    num_tokens: S, the tokens of a group, where experts choose; None where
      tokens choose, as the shapes tell S.
  """

  expert_index: Leaf
  slot: Leaf
  gate: Leaf
  kept: Leaf
  num_experts: int
  capacity: int | None
  token_index: Leaf = None
  num_tokens: int | None = None

  @classmethod
  def of_slots(
    cls,
    token_index: Int[Array, 'G E C'],
    gate: Float[Array, 'G E C'],
    group_size: int,
  ) -> 'Routing':
    """Makes the routing of experts that chose the token in each of their slots.

    Args:
      token_index: The token in each slot, in [0, S); S where it is empty. An
        expert has a token in one slot at most.
      gate: The weight of the expert's output; 0 where the slot is empty.
      group_size: S, the number of tokens in a group.
    """
    _, E, C = shape = token_index.shape
    expert_index = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    slot = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    kept = token_index < group_size
    return cls(expert_index, slot, gate, kept, E, C, token_index, group_size)

  def shape_hints(self) -> dict[str, Any]:
    """The type and shape that each array must have, for `shapes.checked`."""
    # When `of_experts` leaves out experts, the arrays keep the slots of all
    # experts, so that their second axis is not E, but has a name of its own.
    dims = 'G S K' if self.token_index is None else 'G slots_of C'
    hints: dict[str, Any] = {
      'expert_index': Int[Array, dims],
      'slot': Int[Array, dims],
      'gate': Float[Array, dims],
      'kept': Bool[Array, dims],
    }
    if self.token_index is not None:
      hints['token_index'] = Int[Array, dims]
    return hints

  def static_sizes(self) -> dict[str, int]:
    """E and S, by letter, which the shapes of the arrays may not tell.

    Raises:
      ValueError: The capacity is neither None nor an integer of at least 1.
    """
    check_capacity(self.capacity)
    return {'E': self.num_experts, 'S': self.group_size}

  @property
  def group_size(self) -> int:
    """S, the number of tokens in a group."""
    return self.gate.shape[1] if self.num_tokens is None else self.num_tokens

  @property
  def token(self) -> Leaf:
    """int32 of `gate`'s shape: each choice's token, in [0, S) if it is kept."""
    if self.token_index is not None:
      return self.token_index
    return jax.lax.broadcasted_iota(jnp.int32, self.gate.shape, 1)

  @property
  def server(self) -> Leaf:
    """int32, the expert that serves each choice; E where it is not kept."""
    return jnp.where(self.kept, self.expert_index, self.num_experts)

  def bounded(self) -> int:
    """The capacity C; raises ValueError where it is None."""
    if self.capacity is None:
      raise InputError(
        'capacity=None: slots need a capacity; use the capacity rule All()'
      )
    return self.capacity

  def slot_shares(self) -> Bool[Array, 'G S E C']:
    """Whether each slot holds each token; ValueError where C is None.

    `SoftRouting.slot_shares` has fractions, as its slots hold mixtures.
    """
    return self._in_slots(self.kept.astype(jnp.int8)) > 0

  def slot_weights(self) -> Float32[Array, 'G S E C']:
    """Each token's gate in each slot, else 0; ValueError where C is None."""
    return self._in_slots(self.gate)

  def _in_slots(self, values: Leaf) -> Array:
    """`values` of served choices, at their token and slot [G, S, E, C]; else 0.

    There is one value for each choice, in the shape of `gate`.
    """
    E, C = self.num_experts, self.bounded()
    if self.token_index is not None:
      return self._spread(values, self.slot)
    expert = jax.nn.one_hot(self.server, E, dtype=jnp.bool_)  # [G, S, K, E]
    slot = jax.nn.one_hot(self.slot, C, dtype=jnp.bool_)
    place = expert[..., None] & slot[..., None, :]
    return jnp.where(place, values[..., None, None], 0).sum(2)

  def token_gates(self) -> Float32[Array, 'G S E']:
    """Each expert's gate for each token; 0 for a token it does not serve."""
    return self._spread(self.gate)

  def by_token(self, mask: Bool[Array, 'G S']) -> TokenChoices:
    """The choices of real tokens, where the mask is True; padding has none.

    Where tokens choose, N = K. Where experts choose, N = E: a token has one
    entry for each expert, with -1 for an expert that did not take the token.
    """
    real = mask[..., None]
    if self.token_index is None:
      expert = jnp.where(real, self.expert_index, -1)
      gate = jnp.where(self.kept, self.gate, 0.0)
      return TokenChoices(expert, gate, self.kept)
    kept = (self._spread(self.kept.astype(jnp.int8)) > 0) & real
    experts = jnp.arange(self.num_experts, dtype=jnp.int32)
    gate = jnp.where(kept, self.token_gates(), 0.0)
    return TokenChoices(jnp.where(kept, experts, -1), gate, kept)

  def _spread(self, values: Leaf, *slot: Array) -> Array:
    """The sum of served choices' values for each token and expert, [G, S, E].

    `values` has the shape of `gate`. If `slot`, the slot of each choice, is
    given, the sum is for each slot, too: [G, S, E, C].
    """
    group = jax.lax.broadcasted_iota(jnp.int32, self.gate.shape, 0)
    index = group, self.token, self.server, *slot
    sizes = (len(group), self.group_size, self.num_experts, self.capacity)
    total = jnp.zeros(sizes[: len(index)], values.dtype)
    return total.at[index].add(values, mode='drop')

  @jax.named_scope('index')
  def rows_per_expert(self) -> Int32[Array, ' E']:
    """The number of choices that each expert serves, over all groups."""
    count = jnp.zeros(self.num_experts, jnp.int32)
    return decided(count.at[self.server.reshape(-1)].add(1, mode='drop'))

  def of_experts(
    self, number: Int32[Array, ' E'], num_experts: int
  ) -> 'Routing':
    """The routing with the choices of some experts alone, numbered anew.

    Args:
      number: The new index of each expert; `num_experts` or more for experts
        whose choices are left out. No two of the others have the same index.
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
