"""Rules that queue choices of experts already made, and say which are served.

Hash layers, random routing and routers of two levels make such choices. So does
a caller that imposes choices on a router: recorded ones, or choices that give
all experts the same load.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.routing.assignments import Routing
from moe_jax.routing.capacity import check_capacity, check_selected
from moe_jax.routing.rows import decided, stable_argsort
from moe_jax.shapes import Array, Bool, Float32, Int32, Leaf, checked

GIVEN_PRIORITIES = ('token_major', 'choice_major')
# Values in the place of an expert's index: NO_CHOICE says that there is no
# choice, and OPEN that the router itself makes the choice.
NO_CHOICE, OPEN = -1, -2


class GivenChoices(NamedTuple):
  """Choices that are imposed on a router in the place of its own choices.

  Attributes:
    expert: int [G, S, K], the indices of each token's experts, all different
      and in the order of the choices; `NO_CHOICE` where there is none, as at
      padding or, where experts choose, for a token that has fewer than K;
      `OPEN` for all choices of a token whose router chooses itself. Where some
      tokens of a group are open, they queue in their places, so that a choice
      behind them that is imposed as served can find its expert full.
    kept: bool [G, S, K], whether each choice is served; None leaves that to the
      router's queues.
  """

  expert: Leaf
  kept: Leaf = None

  def in_place_of(self, index: Int32[Array, 'G S K']) -> Int32[Array, 'G S K']:
    """The imposed experts; where none is imposed, the router's own, `index`."""
    return jnp.where(self.expert >= 0, self.expert.astype(index.dtype), index)

  def may_take(self, num_experts: int) -> Bool[Array, 'G S E']:
    """Whether each expert may take each token, where experts choose tokens.

    An expert may take the tokens that are imposed on it, and takes all of them.
    Every expert may take a token all of whose choices are `OPEN`.
    """
    chosen = jax.nn.one_hot(self.expert, num_experts, dtype=jnp.bool_)
    return chosen.any(2) | (self.expert == OPEN).all(2, keepdims=True)


def check_given(given: GivenChoices | None, sparse: Sequence[bool]) -> None:
  """Raises ValueError unless choices are [B, T, L, K] of L sparse layers.

  Args:
    given: The choices that are imposed on a stack of layers; None passes.
    sparse: A flag for each layer, whether it has experts.
  """
  if given is None:
    return
  shape, L = given.expert.shape, sum(sparse)
  if len(shape) != 4 or shape[2] != L:
    raise InputError(
      f'given.expert has shape {shape}, and [B, T, L, K] is needed for the '
      f'L={L} sparse layers'
    )


def given_to_layer(
  given: GivenChoices | None,
  sparse: Sequence[bool],
  layer: int | Int32[Array, ''],
) -> GivenChoices | None:
  """The choices [B, T, K] of one layer of a stack; None if none are imposed.

  Args:
    given: The choices that are imposed on the L sparse layers, [B, T, L, K].
    sparse: A flag for each layer, whether it has experts.
    layer: The index among all layers, sparse or not. A layer that is not sparse
      gets the choices of another one, and has to ignore them.
  """
  if given is None:
    return None
  index = jnp.asarray(np.cumsum(sparse, dtype=np.int32) - 1)[layer]
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, 2, keepdims=False), given
  )


@checked
def even_choice(expert_index: Int32[Array, 'G S K'], **queue: Any) -> Routing:
  """Serves choices that were made without logits: every gate is 1/K.

  A dropped choice has gate 0, and the gates of the token's other choices stay.

  Args:
    expert_index: K different experts for each token.
    **queue: The keyword arguments of `given_choice`, which serves the choices:
      `num_experts`, `capacity`, `mask`, `slot_priority` and `given`.
  """
  gate = jnp.full(expert_index.shape, 1 / expert_index.shape[-1], jnp.float32)
  return given_choice(expert_index, gate, **queue)


@checked
def given_choice(
  expert_index: Int32[Array, 'G S K'],
  gate: Float32[Array, 'G S K'],
  *,
  num_experts: int,
  capacity: int | None,
  mask: Bool[Array, 'G S'] | None = None,
  slot_priority: str = 'token_major',
  given: GivenChoices | None = None,
) -> Routing:
  """Serves choices whose gates are given; a dropped choice gets gate 0.

  Args:
    expert_index: K different experts for each token.
    gate: The gate of each choice.
    num_experts: The number E of experts.
    capacity: C, the slots of an expert in each group; None for no bound.
    mask: False for padding, which takes no slot. Default: all real.
    slot_priority: The order in which choices are served: 'token_major' is token
      by token, 'choice_major' all first choices, then all second ones. There
      are no probabilities to order the tokens by, as 'batch_priority' would.
    given: The imposed choices, whose experts already are in `expert_index`;
      their `kept` may say which of them are served.

  Raises:
    ValueError: K is not in [1, E], capacity < 1, or the priority is unknown.
  """
  E, K = num_experts, expert_index.shape[-1]
  check_selected(K, E)
  check_capacity(capacity)
  if slot_priority not in GIVEN_PRIORITIES:
    raise unknown('slot_priority', slot_priority, GIVEN_PRIORITIES)
  if mask is None:
    mask = jnp.ones(expert_index.shape[:2], bool)
  slot, kept = queue_choices(
    expert_index,
    mask,
    num_experts=E,
    capacity=capacity,
    slot_priority=slot_priority,
    given=given,
  )
  gate = jnp.where(kept, gate, 0.0)
  return Routing(expert_index, slot, gate, kept, E, capacity)


@checked
def to_experts(
  routing: Routing,
  expert_of: Int32[Array, ' E'],
  *,
  num_experts: int,
  capacity: int | None,
) -> Routing:
  """Routes the choices of E experts to merged experts, fewer than E.

  A router still has E logits for each token, as before experts were merged. The
  served choices and their gates stay as `routing` has them, where each of the E
  experts had a queue and a capacity of its own. A token that chose two experts
  that are merged into the same expert is in two slots of the merged expert.

  Args:
    routing: The routing to E experts, before experts were merged.
    expert_of: The index of the merged expert in place of each of the E experts.
    num_experts: The number of experts of the result.
    capacity: The slots of an expert of the result, which have room for all
      choices that `routing` serves; None for no bound.
  """
  index = expert_of[routing.expert_index]
  slot = queue_slots(index, routing.kept, num_experts, 'token_major')
  return Routing(
    index, decided(slot), routing.gate, routing.kept, num_experts, capacity
  )


@checked
def one_queue(routing: Routing, capacity: int) -> Routing:
  """Makes one group of all groups, in which served choices queue once more.

  Exchanges with room for a share of the slots need it, to drop other choices.

  Args:
    routing: The routing of several groups, [G, S, K].
    capacity: The slots of an expert for all groups together.

  Returns:
    A routing of one group [1, G * S, K]. Of the choices of an expert that were
    served, the first `capacity` in the order of the tokens stay; the others are
    dropped.
  """
  index, kept, gate = (
    x.reshape(1, -1, x.shape[-1])
    for x in (routing.expert_index, routing.kept, routing.gate)
  )
  E = routing.num_experts
  slot = decided(queue_slots(index, kept, E, 'token_major'))
  kept = kept & (slot < capacity)
  return Routing(index, slot, jnp.where(kept, gate, 0.0), kept, E, capacity)


def queue_choices(
  expert_index: Int32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
  *,
  num_experts: int,
  capacity: int | None,
  slot_priority: str,
  order: Int32[Array, 'G S'] | None = None,
  sent: Bool[Array, 'G S K'] | None = None,
  holds_place: bool = False,
  given: GivenChoices | None = None,
) -> tuple[Int32[Array, 'G S K'], Bool[Array, 'G S K']]:
  """The slot of each choice, and whether the choice is served.

  The slot is the number of choices before it in its expert's queue, 0 for a
  choice that does not queue.

  Served choices that are imposed have the slots that they had when they were
  recorded, if priority and capacity were the same, since the dropped choices
  stood behind them. An imposed choice that is not served has a slot past the
  capacity, so that it counts as dropped; where a random second policy (option
  of `token_choice`) sends only some choices, it has such a slot only if its
  expert is full.

  Args:
    expert_index: The chosen experts.
    mask: False for padding.
    num_experts: The number E of experts.
    capacity: C, or None for no bound.
    slot_priority: 'token_major' queues token by token; by any other value all
      first choices queue before all second ones.
    order: The indices of the tokens in the order in which they queue; None for
      that of the sequence. It goes with choice-major queues alone.
    sent: Whether a second policy sends each choice; a choice that is not sent
      is not served, unless it is imposed as served. Default: all are sent.
    holds_place: Whether a choice that is not sent still counts in its expert's
      queue, so that later choices have the same slots as if it were sent.
    given: The imposed choices; their `kept` may say which of them are served.
  """
  real = jnp.broadcast_to(mask[..., None], expert_index.shape)
  served = real if sent is None else real & sent
  queued, is_imposed = real if holds_place else served, None
  if given is not None and given.kept is not None:
    is_imposed = given.expert != OPEN
    served = jnp.where(is_imposed, real & given.kept, served)
    # If `order` sorts the tokens by probability, it is not known which choices
    # that were not served stood before a served one: only served ones queue.
    if not holds_place or order is not None:
      queued = jnp.where(is_imposed, served, queued)
  slot = queue_slots(expert_index, queued, num_experts, slot_priority, order)
  if capacity is None:
    return decided(slot), served
  if is_imposed is not None:
    dropped = is_imposed & real & ~served
    if sent is not None:
      dropped = dropped & _is_full(expert_index, served, num_experts, capacity)
    slot = jnp.where(dropped, jnp.maximum(slot, capacity), slot)
  slot = decided(slot)
  return slot, served & (slot < capacity)


def _is_full(expert_index, served, E, capacity):
  """Whether `served` choices fill the expert of each choice, bool [G, S, K]."""
  chosen = jax.nn.one_hot(expert_index, E, dtype=jnp.bool_)  # [G, S, K, E]
  count = (chosen & served[..., None]).sum((1, 2))  # [G, E]
  return (chosen & (count >= capacity)[:, None, None]).any(-1)


def queue_slots(
  expert_index: Int32[Array, 'G S K'],
  queued: Bool[Array, 'G S K'],
  E: int,
  slot_priority: str,
  order: Int32[Array, 'G S'] | None = None,
) -> Int32[Array, 'G S K']:
  """The number of choices before each choice in the queue of its expert.

  The number is 0 for a choice that does not queue.

  Args:
    expert_index: The chosen experts.
    queued: True for choices that queue.
    E: The number of experts.
    slot_priority: 'token_major' queues token by token; by any other value all
      first choices queue before all second ones.
    order: The indices of each group's tokens in the order in which they queue,
      where queues are not token-major; None for their order in the sequence.
  """
  G, S, K = expert_index.shape
  if order is not None:
    expert_index = jnp.take_along_axis(expert_index, order[..., None], axis=1)
    queued = jnp.take_along_axis(queued, order[..., None], axis=1)
  if slot_priority != 'token_major':
    expert_index = expert_index.swapaxes(1, 2)  # [G, K, S]
    queued = queued.swapaxes(1, 2)
  # On a CPU `places_by_sort` takes an eighth of the time of `places_by_sum` at
  # E=64, and the same time at E=8.
  places = functools.partial(
    jax.lax.platform_dependent,
    cpu=functools.partial(places_by_sort, num_experts=E),
    default=functools.partial(places_by_sum, num_experts=E),
  )
  slot = jax.vmap(places)(
    expert_index.reshape(G, S * K), queued.reshape(G, S * K)
  )
  if slot_priority == 'token_major':
    return slot.reshape(G, S, K)
  slot = slot.reshape(G, K, S).swapaxes(1, 2)  # [G, S, K]
  if order is not None:
    inverse = jnp.argsort(order, axis=1)
    slot = jnp.take_along_axis(slot, inverse[..., None], axis=1)
  return slot


def places_by_sum(
  expert: Int32[Array, ' N'], queued: Bool[Array, ' N'], num_experts: int
) -> Int32[Array, ' N']:
  """The number of queued choices of the same expert before each queued choice.

  The N choices of a group are in the order in which they queue. The number is
  computed by a sum over one-hot vectors, and is 0 for a choice that does not
  queue.
  """
  choice = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32)
  choice = jnp.where(queued[:, None], choice, 0)  # [N, E]
  return jnp.maximum((jnp.cumsum(choice, 0) * choice).sum(-1) - 1, 0)


def places_by_sort(
  expert: Int32[Array, ' N'], queued: Bool[Array, ' N'], num_experts: int
) -> Int32[Array, ' N']:
  """The number of queued choices of the same expert before each queued choice.

  The N choices of a group are in the order in which they queue. The number is
  computed by a sort, in a time independent of E, and is 0 for a choice that
  does not queue.
  """
  key = jnp.where(queued, expert, num_experts)
  order = stable_argsort(key, num_experts + 1)
  sorted_key = key[order]
  number = jnp.arange(len(sorted_key), dtype=jnp.int32)
  group_start = jnp.append(True, sorted_key[1:] != sorted_key[:-1])
  group_start = jax.lax.cummax(jnp.where(group_start, number, 0))
  queue_place = jnp.where(sorted_key < num_experts, number - group_start, 0)
  return jnp.zeros_like(number).at[order].set(queue_place, unique_indices=True)
