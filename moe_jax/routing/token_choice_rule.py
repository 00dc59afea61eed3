"""Token choice: each token picks K experts, each expert serves its queue.

Switch (K=1, https://arxiv.org/abs/2101.03961), GShard (K=2,
https://arxiv.org/abs/2006.16668), ST-MoE (https://arxiv.org/abs/2202.08906)
and Mixtral (any K, https://arxiv.org/abs/2401.04088) are settings of one
function. The noise of Shazeer et al. 2017 is in `shazeer_rules.py`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.routing.assignments import Routing
from moe_jax.routing.capacity import check_capacity, check_selected
from moe_jax.routing.given_choice_rule import (
  GIVEN_PRIORITIES,
  GivenChoices,
  queue_choices,
)
from moe_jax.routing.rows import decided
from moe_jax.shapes import Array, Bool, Float, Float32, Int32, PRNGKey, checked


class Gate(NamedTuple):
  """The way in which one kind of gates is computed from a token's logits.

  Attributes:
    scores: The scores that gates are computed from; one of
      `balance_bias.SCORES`.
    normalizes: Whether the K gates of a token are made to sum to 1, so that
      with K = 1 the gate would be constant.
  """

  scores: str
  normalizes: bool


GATES = {
  'raw': Gate('softmax', False),
  'renormalized': Gate('softmax', True),
  'renormalized_after_drop': Gate('softmax', True),
  'sigmoid': Gate('sigmoid', False),
  'sigmoid_renormalized': Gate('sigmoid', True),
}
# DeepSeek-V3 adds this number to the sum of sigmoids before it divides by it.
_EPSILON = 1e-20
SLOT_PRIORITIES = (*GIVEN_PRIORITIES, 'batch_priority')
SECOND_POLICIES = ('all', 'sampled', 'threshold')


@checked
def token_choice(
  router_logits: Float[Array, 'G S E'],
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
  given: GivenChoices | None = None,
) -> Routing:
  """Gives each token up to K slots, in experts of its own choice.

  A token chooses the K largest logits; ties go to the lower expert. A choice
  whose expert is full is dropped; the token's other choices stay.

  Args:
    router_logits: The logits, with their noise if they have any. They are
      taken as float32, and so gates are float32.
    num_selected: K.
    capacity: C, or None for unbounded experts, which drop nothing.
    mask: False for padding, which takes no slot. Default: all real.
    gates: 'raw' is the softmax over all experts at the chosen one (Switch).
      'renormalized' makes the K gates sum to one before any is dropped
      (GShard Algorithm 1, ST-MoE; the same number as Mixtral's softmax over
      the chosen logits). 'renormalized_after_drop' makes the gates of the kept
      choices sum to one (praxis). 'sigmoid' is the sigmoid of each chosen logit
      (Loss-Free Balancing, https://arxiv.org/abs/2408.15664).
      'sigmoid_renormalized' divides the K sigmoids by their sum plus 1e-20,
      before any is dropped (DeepSeek-V3, https://arxiv.org/abs/2412.19437).
    slot_priority: The order in which choices are served. 'token_major' is token
      by token, each with all its choices (the only causal order).
      'choice_major' is all first choices, then all second ones (GShard).
      'batch_priority' is choice-major with the tokens ordered by their largest
      probability (V-MoE, https://arxiv.org/abs/2106.05974).
    second_policy: 'all' sends every choice. 'sampled' serves a second choice
      only if 2 * g2 > U(0, 1), g2 renormalised over the two; as in GShard's
      Algorithm 1 a choice that is not served still counts in the queue.
      'threshold' sends any choice after the first with probability
      min(1, g / second_threshold), and a choice queues only if it is sent
      (ST-MoE, section C.2).
    second_threshold: The threshold of the policy 'threshold'.
    key: The key that the last two policies draw from. None (evaluation) sends
      every choice.
    expert_index: The chosen experts, where they are not the K largest logits;
      K different ones for each token.
    given: The imposed choices, whose experts are in `expert_index`. If their
      `kept` says which are served, neither capacity nor second policy decides.

  Raises:
    ValueError: K is not in [1, E], an option is unknown, capacity < 1, K=1
      with renormalised gates (always 1, so that the router has no gradient),
      'sampled' with K other than 2, or a threshold not in (0, 1].
  """
  E, K = router_logits.shape[-1], num_selected
  check_capacity(capacity)
  for name, value, allowed in (
    ('gates', gates, GATES),
    ('slot_priority', slot_priority, SLOT_PRIORITIES),
    ('second_policy', second_policy, SECOND_POLICIES),
  ):
    if value not in allowed:
      raise unknown(name, value, allowed)
  problems = list(
    choice_problems(
      num_experts=E, num_selected=K, gates=gates, second_policy=second_policy
    )
  )
  if second_policy == 'threshold' and not 0 < second_threshold <= 1:
    problems.append(f'second_threshold={second_threshold} not in (0, 1]')
  if problems:
    raise InputError('; '.join(problems))
  router_logits = router_logits.astype(jnp.float32)
  if mask is None:
    mask = jnp.ones(router_logits.shape[:2], bool)
  if expert_index is None:
    expert_index = choose(router_logits, K)  # [G, S, K]
  slot, kept = choice_slots(
    router_logits,
    expert_index,
    mask,
    capacity=capacity,
    slot_priority=slot_priority,
    second_policy=second_policy,
    second_threshold=second_threshold,
    key=key,
    given=given,
  )
  gate = choice_gates(router_logits, expert_index, gates, kept)
  return Routing(expert_index, slot, gate, kept, E, capacity)


@checked
def choice_slots(
  router_logits: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
  *,
  capacity: int | None,
  slot_priority: str = 'token_major',
  second_policy: str = 'all',
  second_threshold: float = 0.2,
  key: PRNGKey | None = None,
  given: GivenChoices | None = None,
) -> tuple[Int32[Array, 'G S K'], Bool[Array, 'G S K']]:
  """The slot of each choice, and whether it is served, as in a `Routing`.

  `expert_index` has all choices, imposed ones (`given`) included. The mask is
  False for padding, which takes no slot. The capacity is None for unbounded
  experts. The priority is the order in which choices are served, and the policy
  (with its threshold and its key, if any) says which choices after the first
  are sent; `token_choice` lists the values of both.
  """
  K, sent, order = expert_index.shape[-1], None, None
  if key is not None and second_policy != 'all' and K > 1:
    share = jax.nn.softmax(at_choices(router_logits, expert_index))
    scale = 2.0 if second_policy == 'sampled' else 1.0 / second_threshold
    draw = jax.random.uniform(key, share.shape)
    first = jnp.arange(K) == 0
    sent = decided(first[None, None] | (scale * share > draw))
  if slot_priority == 'batch_priority':
    # Tokens queue by their largest probability, the largest first, even if its
    # expert is not chosen. Minus its logarithm, computed here, sorts them so.
    logits = jax.lax.stop_gradient(router_logits)
    order = jnp.argsort(jax.nn.logsumexp(logits, axis=-1) - logits.max(-1))
  return queue_choices(
    expert_index,
    mask,
    num_experts=router_logits.shape[-1],
    capacity=capacity,
    slot_priority=slot_priority,
    order=order,
    sent=sent,
    holds_place=second_policy == 'sampled',
    given=given,
  )


@checked
def choose(
  scores: Float32[Array, '*G E'], num_selected: int
) -> Int32[Array, '*G K']:
  """The experts of the K largest scores, the largest first, without a gradient.

  Ties go to the expert of the lower index. K outside [1, E] is a ValueError.
  """
  check_selected(num_selected, scores.shape[-1])
  scores = jax.lax.stop_gradient(scores)
  # `top_k` puts 0. before -0., although they are equal and so tie; this line
  # makes both 0.
  scores = jnp.where(scores == 0, 0.0, scores)
  return decided(jax.lax.top_k(scores, num_selected)[1])


@checked
def at_choices(
  values: Float32[Array, '*G E'], expert_index: Int32[Array, '*G K']
) -> Float32[Array, '*G K']:
  """The values of the chosen experts, read by one-hot sums.

  An index that is no expert's, such as -1, reads 0. Unlike indexing, such a sum
  has a gradient that is a product, not a scatter, and it needs no gather where
  `values` is sharded.
  """
  E = values.shape[-1]
  chosen = jax.nn.one_hot(expert_index, E, dtype=jnp.bool_)  # [..., K, E]
  return jnp.where(chosen, values[..., None, :], 0).sum(-1)


def choice_problems(
  *,
  num_experts: int,
  num_selected: int,
  gates: str = 'raw',
  second_policy: str = 'all',
) -> Iterator[str]:
  """The reasons why `token_choice` refuses E, K or options, as texts.

  `gates` is one of `GATES`, and `second_policy` one of `SECOND_POLICIES`.
  """
  E, K = num_experts, num_selected
  if not 1 <= K <= E:
    yield f'num_selected={K} not in [1, num_experts={E}]'
  if K == 1 and GATES[gates].normalizes:
    allowed = [name for name, gate in GATES.items() if not gate.normalizes]
    yield (
      f'num_selected=1 with gates={gates!r} makes every gate 1 and takes the '
      f"router's gradient away; use gates={' or '.join(map(repr, allowed))}"
    )
  if second_policy == 'sampled' and K != 2:
    yield (
      f"num_selected={K}, but second_policy='sampled' is defined for 2; have "
      "'all', 'threshold'"
    )


@checked
def choice_gates(
  router_logits: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'],
  gates: str,
  kept: Bool[Array, 'G S K'] | None = None,
) -> Float32[Array, 'G S K']:
  """The gates of choices, of one of the kinds that `token_choice` describes.

  Args:
    router_logits: The logits, with their noise if they have any.
    expert_index: The chosen experts.
    gates: The kind, one of `GATES`; 'renormalized_after_drop' alone computes
      the gates of a token from those choices that are kept.
    kept: Whether each choice is served; a choice that is not has gate 0.
      Default: all are served.
  """
  if kept is None:
    kept = jnp.ones(expert_index.shape, bool)
  chosen_logits = at_choices(router_logits, expert_index)
  if gates == 'raw':
    normalizer = jax.nn.logsumexp(router_logits, axis=-1, keepdims=True)
    gate = jnp.exp(chosen_logits - normalizer)
  elif gates == 'renormalized':
    gate = jax.nn.softmax(chosen_logits)
  elif gates == 'sigmoid':
    gate = jax.nn.sigmoid(chosen_logits)
  elif gates == 'sigmoid_renormalized':
    # The quotient is computed by logarithms: its gradient would divide by the
    # square of the sum, which is 0 in float32 where the sum is near epsilon.
    gate = jax.nn.log_sigmoid(chosen_logits)
    normalizer = jax.nn.logsumexp(gate, axis=-1, keepdims=True)
    gate = jnp.exp(gate - jnp.logaddexp(normalizer, math.log(_EPSILON)))
  else:
    assert gates == 'renormalized_after_drop', gates
    # A token without a kept choice would have only -inf, and its softmax NaN.
    any_kept = kept.any(-1, keepdims=True)
    masked = jnp.where(kept, chosen_logits, -jnp.inf)
    gate = jax.nn.softmax(jnp.where(any_kept, masked, 0.0))
  return jnp.where(kept, gate, 0.0)
