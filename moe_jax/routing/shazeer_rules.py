"""The rules of Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538).

Of noisy top-k gating (section 2.1), this file has the noise, and the smooth
load estimator of Appendix A; the choice itself is `token_choice` on the noisy
logits with `gates='renormalized'`.

Two levels of gates over a * b experts (Appendix B): a primary gate chooses
among a branches, and each branch's own gate among its b experts; the expert of
index i * b + j is expert j of branch i. The result is a `Routing` over all
experts, whose gates are products of both levels' gates.

Strictly balanced gating (Appendix F): every expert has as many tokens as every
other. In training an expert takes, of the n tokens of the group, the
m = K n / E whose gate for it is largest (the batchwise mask). This depends on
all tokens of the group and is not causal. In inference an expert takes the
tokens whose gate is above a threshold of its own, which training has made to
agree with the mask. A token has any number of experts, or none; its gates are
renormalised over the experts that took it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.routing.assignments import Routing
from moe_jax.routing.aux_losses import (
  cv_squared,
  importance_loss,
  over_groups,
  token_z,
)
from moe_jax.routing.capacity import check_selected, check_slots
from moe_jax.routing.expert_choice_rule import expert_choice, likeliest_tokens
from moe_jax.routing.stats import (
  MoeAux,
  no_exchange,
  routing_stats,
  token_entropy,
  token_square,
)
from moe_jax.routing.token_choice_rule import at_choices, choose
from moe_jax.shapes import Array, Bool, Float32, Int32, Leaf, PRNGKey, checked


class NoisyLogits(NamedTuple):
  """Logits with and without tunable Gaussian noise, for the load estimator.

  Attributes:
    clean: float32 [G, S, E], the logits without noise, x Wg.
    noisy: float32 [G, S, E], clean + N(0, 1) * std; equal to clean where no
      noise was drawn.
    std: float32 [G, S, E], the standard deviation of the noise,
      Softplus(x Wnoise), also where no noise was drawn.
  """

  clean: Array
  noisy: Array
  std: Array


@checked
def noisy_logits(
  clean: Float32[Array, 'G S E'],
  noise: Float32[Array, 'G S E'],
  key: PRNGKey | None,
) -> NoisyLogits:
  """Adds N(0, 1) * Softplus(noise) to the logits, or nothing if key is None.

  The logits `clean` are x Wg, and `noise` is x Wnoise.

  Source: Eq. 4 of arXiv:1701.06538. With Wg and Wnoise initialised to zero, as
  in the paper, std starts at ln 2.
  """
  std = jax.nn.softplus(noise)
  if key is None:
    return NoisyLogits(clean, clean, std)
  draw = jax.random.normal(key, clean.shape, clean.dtype)
  return NoisyLogits(clean, clean + draw * std, std)


@checked
def load_probability(
  logits: NoisyLogits,
  num_selected: int,
  largest: Int32[Array, 'G S N'] | None = None,
) -> Float32[Array, 'G S E']:
  """P(x, i): the chance that expert i is chosen if only its noise is redrawn.

  P(x, i) = Phi((clean_i - kth_excluding(Z, K, i)) / std_i), where Z are the
  noisy logits and Phi is the normal distribution's function.

  Source: Eq. 8-9 of arXiv:1701.06538. kth_excluding(Z, K, i) is the K-th
  largest of the noisy logits other than logit i; for i among the K largest, it
  is the (K+1)-th of all logits. With K = E every expert is always chosen, and
  the chance is 1.

  Args:
    logits: The logits without and with noise.
    num_selected: K.
    largest: The min(K + 1, E) experts of largest noisy logits, the largest
      first. None: they are computed.
  """
  E, K = logits.noisy.shape[-1], num_selected
  if K >= E:
    return jnp.ones_like(logits.noisy)
  index = choose(logits.noisy, K + 1) if largest is None else largest
  value = at_choices(logits.noisy, index)  # [G, S, K+1]
  inside = jax.nn.one_hot(index[..., :K], E, dtype=jnp.bool_).any(-2)
  threshold = jnp.where(inside, value[..., K:], value[..., K - 1 : K])
  # Where training has taken the noise away, Softplus underflows to 0, by which
  # the next line would divide.
  std = jnp.maximum(logits.std, 1e-6)
  return jax.scipy.stats.norm.cdf((logits.clean - threshold) / std)


@checked
def flat_choices(
  branch_index: Int32[Array, 'G S K1'],
  branch_gate: Float32[Array, 'G S K1'],
  expert_index: Int32[Array, 'G S K1 K2'],
  expert_gate: Float32[Array, 'G S K1 K2'],
  branch_size: int,
) -> tuple[Int32[Array, 'G S K'], Float32[Array, 'G S K']]:
  """The K1 * K2 choices among all experts, and their gates gp_i * g_ij.

  The choices of a token's first branch come first.

  Args:
    branch_index: The chosen branches, in [0, a).
    branch_gate: The primary gate's weights of the chosen branches.
    expert_index: The experts chosen within each chosen branch, in [0, b).
    expert_gate: The weights of those experts, from their branch's gate.
    branch_size: b, the number of experts in a branch.

  Source: Eq. 12 of arXiv:1701.06538.
  """
  G, S, K1, K2 = expert_index.shape
  index = branch_index[..., None] * branch_size + expert_index
  gate = branch_gate[..., None] * expert_gate
  return index.reshape(G, S, K1 * K2), gate.reshape(G, S, K1 * K2)


@checked
def hierarchical_load(
  branch_probability: Float32[Array, 'G S A'],
  expert_probability: Float32[Array, 'G S K1 B'],
  branch_index: Int32[Array, 'G S K1'],
  mask: Bool[Array, 'G S'],
) -> Float32[Array, 'G E']:
  """Load_H of expert j of branch i: Load_p(X)_i * Load_i(X_i)_j / |X_i|.

  Load_p and Load_i sum the P(x, .) of the primary gate and of branch i's gate.
  X_i are the real tokens that chose branch i; its load is 0 if none did. There
  are A branches of B experts each, and a token chooses K1 branches. The primary
  gate's gradient comes from the first factor.

  Args:
    branch_probability: P(x, i), the chance that token x chooses branch i
      (`load_probability`).
    expert_probability: P(x, j), the chance that it chooses expert j of each
      chosen branch.
    branch_index: The chosen branches.
    mask: False for padding.

  Source: Eq. 14 of arXiv:1701.06538.
  """
  G, _, A = branch_probability.shape
  real = mask[..., None]
  branch_load = jnp.where(real, branch_probability, 0.0).sum(1)  # [G, A]
  chosen = jax.nn.one_hot(branch_index, A) * real[..., None]  # [G, S, K1, A]
  num_chosen = chosen.sum((1, 2))  # [G, A]
  expert_load = jnp.einsum(
    'GSKA,GSKB->GAB',
    chosen,
    jnp.where(real[..., None], expert_probability, 0.0),
    precision=jax.lax.Precision.HIGHEST,
  )
  share = branch_load / jnp.maximum(num_chosen, 1.0)
  return (share[..., None] * expert_load).reshape(G, -1)


class GateLevel(NamedTuple):
  """One of two levels of gates, for N tokens or for N choices of branches.

  For the primary gate N is S, and E counts branches. For the gates of the
  chosen branches N is S times the choices of a token, and E counts the experts
  of one branch.

  Attributes:
    clean: float32 [G, N, E], the logits without noise.
    index: int32 [G, N, K], the chosen branches or experts.
    gate: float32 [G, N, K], the weights of `index`, before drops.
    probability: float32 [G, N, E], the chance of each branch or expert to be
      chosen, from `load_probability`; None without noise.
  """

  clean: Array
  index: Array
  gate: Array
  probability: Leaf


def levels_aux(
  chosen: Routing,
  gate: Float32[Array, 'G S K'],
  branch: GateLevel,
  expert: GateLevel,
  mask: Bool[Array, 'G S'],
) -> MoeAux:
  """The losses and statistics of two levels of gates, summed over real tokens.

  The losses are 'z_loss', 'importance_loss' and 'load_loss'.
  Entropy, squared logits and z-loss are the primary gate's plus those of the
  chosen branches, weighted by the primary gate. The paper has no balance loss
  for two levels.

  Args:
    chosen: The routing among all experts.
    gate: The gates of its choices, before any is dropped.
    branch: The level of the primary gate.
    expert: The level of the gates of the chosen branches.
    mask: False for padding.
  """
  index, E = chosen.expert_index, chosen.num_experts
  importance = importance_loss(gate, index, mask, E)
  load = jnp.zeros(len(mask), jnp.float32)
  if branch.probability is not None:
    probability = expert.probability.reshape(*branch.index.shape, -1)
    expected_load = hierarchical_load(
      branch.probability, probability, branch.index, mask
    )
    load = cv_squared(expected_load)

  def summed(per_token):
    """The sum over real tokens of `per_token`(logits), of both levels.

    `per_token` is a function from logits [..., E] to a number for each token.
    """
    inner = per_token(expert.clean).reshape(branch.gate.shape)
    # Without a gradient of the weights, the z-loss does not move tokens to
    # branches with small logits.
    weight = jax.lax.stop_gradient(branch.gate)
    measure = per_token(branch.clean) + (weight * inner).sum(-1)  # [G, S]
    return jnp.where(mask, measure, 0.0).sum()

  losses = {
    'z_loss': summed(token_z),
    'importance_loss': over_groups(importance, mask),
    'load_loss': over_groups(load, mask),
  }
  stats = routing_stats(chosen, None, mask)._replace(
    entropy=jax.lax.stop_gradient(summed(token_entropy)),
    logit_square=jax.lax.stop_gradient(summed(token_square)),
  )
  return MoeAux(losses, stats, no_exchange())


@checked
def batchwise_choice(
  router_logits: Float32[Array, 'G S E'],
  *,
  num_selected: int,
  mask: Bool[Array, 'G S'],
) -> Routing:
  """The batchwise mask: each expert takes m = ceil(K S / E) tokens.

  They are those with the largest gates, the softmax of the logits; the gates of
  the result sum to one over a token's experts. Each group is a batch of its
  own. In a padded group of n real tokens, where the mask is True, an expert
  takes ceil(m n / S). Ties go to the earlier token. A K that is not in [1, E]
  raises ValueError.

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
) -> Routing:
  """The threshold mask: experts take tokens with gates above their threshold.

  Gates are the softmax of the logits, and in the result sum to one over a
  token's experts. An expert with fewer slots than such tokens takes those with
  the largest gates. With room for all, a token's experts depend on the token
  alone.

  No expert takes padding, where the mask is False. An expert has `capacity`
  slots in each group; a number that is not in [1, S] raises ValueError.

  Source: Eq. 19 of arXiv:1701.06538.
  """
  G, S, _ = router_logits.shape
  check_slots(capacity, S)
  above = jax.nn.softmax(router_logits) > thresholds[None, None]
  above = above & mask[..., None]
  most = jnp.full(G, capacity, jnp.int32)
  return _renormalized(likeliest_tokens(router_logits, above, most, capacity))


@checked
def batchwise_loss(
  router_logits: Float32[Array, 'G S E'],
  thresholds: Float32[Array, ' E'],
  chosen: Routing,
  mask: Bool[Array, 'G S'],
) -> Float32[Array, ' G']:
  """sum_i (threshold mask - batchwise mask)_i * (gate_i - T_i), over experts i.

  The loss is never negative, and 0 where the two masks agree. The masks have no
  gradient; gates and thresholds have one. The loss is a mean over real tokens,
  not a sum as in the paper, so that it does not grow with the batch.

  Args:
    router_logits: The logits, whose softmax is the gates.
    thresholds: The threshold T of each expert.
    chosen: The batchwise mask, from `batchwise_choice`.
    mask: False for padding.

  Source: Eq. 20 of arXiv:1701.06538.
  """
  probs = jax.nn.softmax(router_logits)  # [G, S, E]
  difference = probs - thresholds[None, None]
  token_mask = chosen.by_token(mask).kept
  signs = (difference > 0).astype(jnp.float32) - token_mask.astype(jnp.float32)
  per_token = (jax.lax.stop_gradient(signs) * difference).sum(-1)
  real = jnp.maximum(mask.sum(-1), 1).astype(jnp.float32)
  return jnp.where(mask, per_token, 0.0).sum(-1) / real


def _renormalized(chosen: Routing) -> Routing:
  """The routing with its gates scaled to sum to one over a token's experts."""
  G = len(chosen.gate)
  group = jnp.arange(G, dtype=jnp.int32)[:, None, None]
  total = jnp.zeros((G, chosen.group_size), jnp.float32)
  total = total.at[group, chosen.token].add(chosen.gate, mode='drop')
  divisor = total.at[group, chosen.token].get(mode='fill', fill_value=1.0)
  gate = chosen.gate / jnp.where(divisor > 0, divisor, 1.0)
  return dataclasses.replace(chosen, gate=jnp.where(chosen.kept, gate, 0.0))
