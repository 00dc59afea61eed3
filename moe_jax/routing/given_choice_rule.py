"""Queues of choices that are already made: which of them experts serve.

Hash layers, random routing and routers of two levels make such choices. Not
here: choices by logits (`token_choice_rule.py`), which queue likewise.
"""

import jax
import jax.numpy as jnp

from moe_jax.options import unknown
from moe_jax.routing.assignments import Routing
from moe_jax.routing.rows import decided
from moe_jax.routing.size_checks import check_capacity, check_selected
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Bool, Float32, Int32

GIVEN_PRIORITIES = ('token_major', 'choice_major')


@checked
def even_choice(
  expert_index: Int32[Array, 'G S K'],
  *,
  num_experts: int,
  capacity: int | None,
  mask: Bool[Array, 'G S'] | None = None,
  slot_priority: str = 'token_major',
) -> Routing:
  """Serves choices that were made without logits: every gate is 1/K.

  A dropped choice has gate 0, which no other choice makes up for. Arguments
  and errors are those of `given_choice`.
  """
  gate = jnp.full(expert_index.shape, 1 / expert_index.shape[-1], jnp.float32)
  return given_choice(
    expert_index,
    gate,
    num_experts=num_experts,
    capacity=capacity,
    mask=mask,
    slot_priority=slot_priority,
  )


@checked
def given_choice(
  expert_index: Int32[Array, 'G S K'],
  gate: Float32[Array, 'G S K'],
  *,
  num_experts: int,
  capacity: int | None,
  mask: Bool[Array, 'G S'] | None = None,
  slot_priority: str = 'token_major',
) -> Routing:
  """Serves choices whose gates are given; that of a dropped choice becomes 0.

  Args:
    expert_index: K different experts for each token.
    gate: The gate of each choice.
    num_experts: The number E of experts.
    capacity, mask: As in `token_choice`.
    slot_priority: 'token_major' or 'choice_major'; there are no probabilities
      to order the tokens by, as 'batch_priority' would.

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
  queued = jnp.broadcast_to(mask[..., None], expert_index.shape)
  slot = decided(queue_slots(expert_index, queued, E, slot_priority))
  kept = queued if capacity is None else queued & (slot < capacity)
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
  """A routing in which several of E columns may lead to the same expert.

  Which choices are served, and their gates, stay those of the columns, each of
  which has had a queue and a capacity of its own. A token that chose two
  columns of an expert is in two of its slots.

  Args:
    routing: The routing to columns, as if each were an expert.
    expert_of: The expert of each column that a token may have chosen.
    num_experts: The number of experts.
    capacity: The slots of an expert, which have room for all choices that its
      columns serve; None for no bound.
  """
  index = expert_of[routing.expert_index]
  slot = queue_slots(index, routing.kept, num_experts, 'token_major')
  return Routing(
    index, decided(slot), routing.gate, routing.kept, num_experts, capacity
  )


@checked
def one_queue(routing: Routing, capacity: int) -> Routing:
  """The choices of all groups in one group, which queue once more.

  Args:
    routing: The routing of several groups, [G, S, K].
    capacity: The slots of an expert for all groups together.

  Returns:
    A routing of one group [1, G * S, K]. Of the choices that were served, those
    past an expert's `capacity` first, in the order of the tokens, are dropped.
  """
  index, kept, gate = (
    x.reshape(1, -1, x.shape[-1])
    for x in (routing.expert_index, routing.kept, routing.gate)
  )
  E = routing.num_experts
  slot = decided(queue_slots(index, kept, E, 'token_major'))
  kept = kept & (slot < capacity)
  return Routing(index, slot, jnp.where(kept, gate, 0.0), kept, E, capacity)


def queue_slots(
  expert_index: Int32[Array, 'G S K'],
  queued: Bool[Array, 'G S K'],
  E: int,
  slot_priority: str,
  order: Int32[Array, 'G S'] | None = None,
) -> Int32[Array, 'G S K']:
  """The number of choices before each in its expert's queue; 0 outside of it.

  Args:
    expert_index: The chosen experts.
    queued: True for choices that queue.
    E: The number of experts.
    slot_priority: 'token_major'; any other value makes choice-major queues.
    order: The order in which the tokens of each group queue; None for that of
      the sequence.
  """
  G, S, K = expert_index.shape
  if order is not None:
    expert_index = jnp.take_along_axis(expert_index, order[..., None], axis=1)
    queued = jnp.take_along_axis(queued, order[..., None], axis=1)
  if slot_priority != 'token_major':
    expert_index = expert_index.swapaxes(1, 2)  # [G, K, S]
    queued = queued.swapaxes(1, 2)
  expert_line = expert_index.reshape(G, S * K)
  queued_line = queued.reshape(G, S * K)
  choice = jax.nn.one_hot(expert_line, E, dtype=jnp.int32)
  choice = jnp.where(queued_line[..., None], choice, 0)  # [G, S*K, E]
  before = (jnp.cumsum(choice, axis=1) * choice).sum(-1) - 1  # [G, S*K]
  slot = jnp.maximum(before, 0)
  if slot_priority == 'token_major':
    return slot.reshape(G, S, K)
  slot = slot.reshape(G, K, S).swapaxes(1, 2)  # [G, S, K]
  if order is not None:
    inverse = jnp.argsort(order, axis=1)
    slot = jnp.take_along_axis(slot, inverse[..., None], axis=1)
  return slot
