"""Strictly balanced gating: every expert has as many tokens as every other.

Shazeer et al. 2017, Appendix F (https://arxiv.org/abs/1701.06538). In training
an expert takes the m = K n / E tokens of the group whose gate for it is largest
(the batchwise mask), which depends on all of them: not causal. In inference it
takes those whose gate is above a threshold of its own, which training has made
to agree with the mask. A token has any number of experts, or none; its gates
are renormalised over those it has.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.assignments import SlotRouting
from moe_jax.routing.expert_choice_rule import expert_choice
from moe_jax.routing.rows import decided
from moe_jax.routing.size_checks import check_selected, check_slots
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Bool, Float32, Int32


@checked
def batchwise_choice(
  router_logits: Float32[Array, 'G S E'],
  *,
  num_selected: int,
  mask: Bool[Array, 'G S'],
) -> SlotRouting:
  """The batchwise mask: each expert takes m = ceil(K S / E) tokens.

  Each group is a batch of its own. In a padded group of n real tokens it is
  ceil(m n / S). Ties go to the earlier token.

  Source: Eq. 16 and 18 of arXiv:1701.06538.
  """
  S, E = router_logits.shape[1:]
  check_selected(num_selected, E)
  capacity = -(-num_selected * S // E)
  chosen = expert_choice(router_logits, capacity=capacity, mask=mask)
  return _renormalized(chosen)


@checked
def threshold_choice(
  router_logits: Float32[Array, 'G S E'],
  thresholds: Float32[Array, ' E'],
  *,
  capacity: int,
  mask: Bool[Array, 'G S'],
) -> SlotRouting:
  """The threshold mask: experts take tokens with gates above their threshold.

  Where these are more than an expert has slots, it takes the largest gates;
  with room for all, a token's experts depend on that token alone.

  Source: Eq. 19 of arXiv:1701.06538.
  """
  S = router_logits.shape[1]
  check_slots(capacity, S)
  probs = jax.nn.softmax(router_logits).swapaxes(1, 2)  # [G, E, S]
  above = (probs > thresholds[None, :, None]) & mask[:, None]
  scores = jnp.where(above, jax.lax.stop_gradient(probs), -1.0)
  index = decided(jax.lax.top_k(scores, capacity)[1])  # [G, E, C]
  filled = jnp.take_along_axis(above, index, axis=2)
  gate = jnp.take_along_axis(probs, index, axis=2)
  return _renormalized(
    SlotRouting(
      token_index=jnp.where(filled, index, S),
      gate=jnp.where(filled, gate, 0.0),
      group_size=S,
    )
  )


@checked
def batchwise_loss(
  router_logits: Float32[Array, 'G S E'],
  thresholds: Float32[Array, ' E'],
  chosen: SlotRouting,
  mask: Bool[Array, 'G S'],
) -> Float32[Array, ' G']:
  """sum_i (threshold mask - batchwise mask)_i * (gate_i - T_i), over experts i.

  Never negative, and 0 where the two masks agree. The masks have no gradient;
  gates and thresholds have. Unlike the paper's it is a mean over real tokens,
  not a sum, so that it does not grow with the batch.

  Args:
    router_logits: The logits, whose softmax is the gates.
    thresholds: The threshold T of each expert.
    chosen: The batchwise mask, from `batchwise_choice`.
    mask: False for padding.

  Source: Eq. 20 of arXiv:1701.06538.
  """
  probs = jax.nn.softmax(router_logits)  # [G, S, E]
  difference = probs - thresholds[None, None]
  token_mask = _token_mask(chosen)
  signs = (difference > 0).astype(jnp.float32) - token_mask.astype(jnp.float32)
  per_token = (jax.lax.stop_gradient(signs) * difference).sum(-1)
  real = jnp.maximum(mask.sum(-1), 1).astype(jnp.float32)
  return jnp.where(mask, per_token, 0.0).sum(-1) / real


def _token_mask(chosen: SlotRouting) -> Bool[Array, 'G S E']:
  """Whether each expert took each token."""
  G, E, _ = chosen.token_index.shape
  group, expert = _indices(G, E)
  mask = jnp.zeros((G, chosen.group_size, E), bool)
  return mask.at[group, chosen.token_index, expert].set(True, mode='drop')


def _renormalized(chosen: SlotRouting) -> SlotRouting:
  """The same choices with gates that sum to one over each token's experts."""
  G, E, _ = chosen.token_index.shape
  group, _ = _indices(G, E)
  total = jnp.zeros((G, chosen.group_size), jnp.float32)
  total = total.at[group, chosen.token_index].add(chosen.gate, mode='drop')
  divisor = total.at[group, chosen.token_index].get(mode='fill', fill_value=1.0)
  gate = jnp.where(
    chosen.filled, chosen.gate / jnp.where(divisor > 0, divisor, 1.0), 0
  )
  return SlotRouting(chosen.token_index, gate, chosen.group_size)


def _indices(
  G: int, E: int
) -> tuple[Int32[Array, 'G 1 1'], Int32[Array, '1 E 1']]:
  return (
    jnp.arange(G, dtype=jnp.int32)[:, None, None],
    jnp.arange(E, dtype=jnp.int32)[None, :, None],
  )
