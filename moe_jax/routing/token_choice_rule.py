"""Token choice: each token picks K experts, each expert serves its queue.

Switch (K=1, https://arxiv.org/abs/2101.03961), GShard (K=2,
https://arxiv.org/abs/2006.16668), ST-MoE (https://arxiv.org/abs/2202.08906)
and Mixtral (any K, https://arxiv.org/abs/2401.04088) are settings of one
function. The noise of Shazeer et al. 2017 is in `noisy_top_k_rule.py`.
"""

import jax
import jax.numpy as jnp

from moe_jax.config import unknown
from moe_jax.routing.assignments import Routing, decided
from moe_jax.shapes import Array, Bool, Float32, Int32, PRNGKey

GATES = ('raw', 'renormalized', 'renormalized_after_drop', 'sigmoid')
SLOT_PRIORITIES = ('token_major', 'choice_major', 'batch_priority')
SECOND_POLICIES = ('all', 'sampled', 'threshold')


def token_choice(
  router_logits: Float32[Array, 'G S E'],
  *,
  num_selected: int,
  capacity: int | None,
  mask: Bool[Array, 'G S'] | None = None,
  gates: str = 'raw',
  slot_priority: str = 'token_major',
  second_policy: str = 'all',
  second_threshold: float = 0.2,
  key: PRNGKey | None = None,
  expert_index: Int32[Array, 'G S K'] | None = None,
) -> Routing:
  """Gives each token up to K slots, in experts of its own choice.

  A token chooses the K largest logits; ties go to the lower expert. A choice
  whose expert is full is dropped; the token's other choices stay.

  Args:
    router_logits: Logits; where they carry noise, the noise is in them.
    num_selected: K.
    capacity: C, or None for unbounded experts, which drop nothing.
    mask: False for padding, which takes no slot. Default: all real.
    gates: 'raw' is the softmax over all experts at the chosen one (Switch).
      'renormalized' makes the K gates sum to one before any is dropped
      (GShard Algorithm 1, ST-MoE; the same number as Mixtral's softmax over
      the chosen logits). 'renormalized_after_drop' makes the kept ones sum
      to one (praxis). 'sigmoid' is each chosen logit's own (Loss-Free
      Balancing, https://arxiv.org/abs/2408.15664).
    slot_priority: Who is served first. 'token_major': earlier tokens, each
      with all its choices (the only causal one). 'choice_major': all first
      choices, then all second ones (GShard). 'batch_priority': as
      choice-major, with the tokens ordered by their largest probability
      (V-MoE, https://arxiv.org/abs/2106.05974).
    second_policy: 'all' sends every choice. 'sampled' serves a second choice
      only if 2 * g2 > U(0, 1), g2 renormalised over the two; as in GShard's
      Algorithm 1 it keeps its place in the queue even so. 'threshold' sends
      any choice after the first with probability min(1, g / second_threshold)
      and it queues only if sent (ST-MoE, section C.2).
    second_threshold: The threshold of the policy of that name.
    key: For the last two policies. None (evaluation) sends every choice.
    expert_index: The choices, where they are not the K largest logits; K
      different experts a token.

  Raises:
    ValueError: K is not in [1, E], an option is unknown, capacity < 1, K=1
      with renormalised gates (they are the constant 1, which takes the
      router's gradient away), or 'sampled' with K other than 2.
  """
  E, K = router_logits.shape[-1], num_selected
  check_token_choice(
    num_experts=E,
    num_selected=K,
    capacity=capacity,
    gates=gates,
    slot_priority=slot_priority,
    second_policy=second_policy,
    second_threshold=second_threshold,
  )
  if mask is None:
    mask = jnp.ones(router_logits.shape[:2], bool)
  if expert_index is None:
    expert_index = choose(router_logits, K)  # [G, S, K]
  chosen_logits = at_choices(router_logits, expert_index)
  pair_gate = jax.nn.softmax(chosen_logits)  # [G, S, K]
  queued = jnp.broadcast_to(mask[..., None], expert_index.shape)
  served = queued
  if key is not None and second_policy != 'all' and K > 1:
    sent = decided(_sent(pair_gate, second_policy, second_threshold, key))
    served = queued & sent
    queued = queued if second_policy == 'sampled' else served
  if slot_priority == 'batch_priority':
    order = jnp.argsort(-_top_probability(router_logits, chosen_logits))
  else:
    order = None
  slot = decided(_slots(expert_index, queued, E, slot_priority, order))
  kept = served if capacity is None else served & (slot < capacity)
  gate = _gates(gates, router_logits, chosen_logits, pair_gate, kept)
  return Routing(expert_index, slot, gate, kept, E, capacity)


def even_choice(
  expert_index: Int32[Array, 'G S K'],
  *,
  num_experts: int,
  capacity: int | None,
  mask: Bool[Array, 'G S'] | None = None,
  slot_priority: str = 'token_major',
) -> Routing:
  """Serves choices that were made without logits: every gate is 1/K.

  A dropped choice's share is lost. Arguments and errors are those of
  `given_choice`.
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


def given_choice(
  expert_index: Int32[Array, 'G S K'],
  gate: Float32[Array, 'G S K'],
  *,
  num_experts: int,
  capacity: int | None,
  mask: Bool[Array, 'G S'] | None = None,
  slot_priority: str = 'token_major',
) -> Routing:
  """Serves choices whose gates are settled; a dropped one's is lost.

  Args:
    expert_index: K different experts a token.
    gate: Of each choice.
    num_experts: E.
    capacity, mask: As in `token_choice`.
    slot_priority: 'token_major' or 'choice_major'; no token is surer of its
      choice than another.

  Raises:
    ValueError: K is not in [1, E], capacity < 1, or the priority is another.
  """
  check_token_choice(
    num_experts=num_experts,
    num_selected=expert_index.shape[-1],
    capacity=capacity,
    gates='raw',
    slot_priority=slot_priority,
    second_policy='all',
    second_threshold=1.0,
  )
  if slot_priority == 'batch_priority':
    raise ValueError(
      "slot_priority='batch_priority' without probabilities to sort by; use "
      "'token_major' or 'choice_major'"
    )
  if mask is None:
    mask = jnp.ones(expert_index.shape[:2], bool)
  queued = jnp.broadcast_to(mask[..., None], expert_index.shape)
  slot = decided(_slots(expert_index, queued, num_experts, slot_priority, None))
  kept = queued if capacity is None else queued & (slot < capacity)
  gate = jnp.where(kept, gate, 0.0)
  return Routing(expert_index, slot, gate, kept, num_experts, capacity)


def choose(
  scores: Float32[Array, '*G E'], num_selected: int
) -> Int32[Array, '*G K']:
  """The K largest of each row, ties to the lower index; no gradient."""
  scores = jax.lax.stop_gradient(scores)
  return decided(jax.lax.top_k(scores, num_selected)[1])


def at_choices(
  values: Float32[Array, '*G E'], expert_index: Int32[Array, '*G K']
) -> Float32[Array, '*G K']:
  """The values of the chosen experts, read by one-hot sums.

  Their gradient is then a product, not a scatter, and under sharding needs no
  gather.
  """
  E = values.shape[-1]
  chosen = jax.nn.one_hot(expert_index, E, dtype=jnp.bool_)  # [..., K, E]
  return jnp.where(chosen, values[..., None, :], 0).sum(-1)


def check_token_choice(
  *,
  num_experts: int,
  num_selected: int,
  capacity: int | None,
  gates: str,
  slot_priority: str,
  second_policy: str,
  second_threshold: float,
) -> None:
  """Raises what `token_choice` would, before there are arrays."""
  E, K = num_experts, num_selected
  if not 1 <= K <= E:
    raise ValueError(f'num_selected={K} not in [1, num_experts={E}]')
  if capacity is not None and capacity < 1:
    raise ValueError(f'capacity={capacity} must be at least 1, or None')
  for name, value, have in (
    ('gates', gates, GATES),
    ('slot_priority', slot_priority, SLOT_PRIORITIES),
    ('second_policy', second_policy, SECOND_POLICIES),
  ):
    if value not in have:
      raise unknown(name, value, have)
  if K == 1 and gates.startswith('renormalized'):
    raise ValueError(
      f'gates={gates!r} with num_selected=1 makes every gate 1 and takes the '
      "router's gradient away; use gates='raw'"
    )
  if second_policy == 'sampled' and K != 2:
    raise ValueError(
      f"second_policy='sampled' is defined for num_selected=2, not {K}; "
      "have 'all', 'threshold'"
    )
  if second_policy == 'threshold' and not 0 < second_threshold <= 1:
    raise ValueError(f'second_threshold={second_threshold} not in (0, 1]')


def _sent(pair_gate, policy, threshold, key):
  """Which choices are sent at all; the first always is. bool [G, S, K]."""
  scale = 2.0 if policy == 'sampled' else 1.0 / threshold
  draw = jax.random.uniform(key, pair_gate.shape)
  first = jnp.arange(pair_gate.shape[-1]) == 0
  return first[None, None] | (scale * pair_gate > draw)


def _top_probability(router_logits, chosen_logits):
  normalizer = jax.nn.logsumexp(router_logits, axis=-1)
  return jax.lax.stop_gradient(chosen_logits[..., 0] - normalizer)  # [G, S]


def _slots(
  expert_index: Int32[Array, 'G S K'],
  queued: Bool[Array, 'G S K'],
  E: int,
  slot_priority: str,
  order: Int32[Array, 'G S'] | None,
) -> Int32[Array, 'G S K']:
  """Each choice's place in its expert's queue; 0 where it does not queue."""
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
  place = (jnp.cumsum(choice, axis=1) * choice).sum(-1) - 1  # [G, S*K]
  slot = jnp.maximum(place, 0)
  if slot_priority == 'token_major':
    return slot.reshape(G, S, K)
  slot = slot.reshape(G, K, S).swapaxes(1, 2)  # [G, S, K]
  if order is not None:
    inverse = jnp.argsort(order, axis=1)
    slot = jnp.take_along_axis(slot, inverse[..., None], axis=1)
  return slot


def gates_before_drop(
  router_logits: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'],
  gates: str,
) -> Float32[Array, 'G S K']:
  """The gates of `token_choice` as if every choice were served."""
  chosen_logits = at_choices(router_logits, expert_index)
  kept = jnp.ones(chosen_logits.shape, bool)
  pair_gate = jax.nn.softmax(chosen_logits)
  return _gates(gates, router_logits, chosen_logits, pair_gate, kept)


def _gates(gates, router_logits, chosen_logits, pair_gate, kept):
  if gates == 'raw':
    normalizer = jax.nn.logsumexp(router_logits, axis=-1, keepdims=True)
    gate = jnp.exp(chosen_logits - normalizer)
  elif gates == 'renormalized':
    gate = pair_gate
  elif gates == 'sigmoid':
    gate = jax.nn.sigmoid(chosen_logits)
  else:
    # A row with nothing kept would be all -inf, and its softmax NaN.
    any_kept = kept.any(-1, keepdims=True)
    masked = jnp.where(kept, chosen_logits, -jnp.inf)
    gate = jax.nn.softmax(jnp.where(any_kept, masked, 0.0))
  return jnp.where(kept, gate, 0.0)
