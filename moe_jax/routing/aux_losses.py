"""The balancing losses of the literature, one function per equation.

Every function works per group, on real tokens only, returns float32 [G] and
is unweighted: coefficients, and the average over groups, are the caller's. A
group without real tokens has loss 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import unknown
from moe_jax.shapes import Array, Bool, Float32, Int32, checked

BALANCE_CHOICES = ('all', 'first')


@checked
def balance_loss(
  router_probs: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
  choices: str = 'all',
) -> Float32[Array, ' G']:
  """Returns E * sum_e f_e P_e for each group, the balance loss of Switch.

  f_e is the fraction of choices that go to expert e, and P_e is the mean
  probability of e. The value at perfect balance is 1 for every K and E, as f_e
  sums to 1 over experts (in flaxformer and MaxText it sums to K; GShard's loss
  as printed is this one divided by E^2). Choices are counted before any is
  dropped, and the gradient flows through P alone.

  Args:
    router_probs: The softmax of the logits over all experts.
    expert_index: The chosen experts, before any choice is dropped.
    mask: False for padding.
    choices: 'all' counts all K choices, 'first' only the largest (GShard
      Algorithm 1, ST-MoE); for K=1 (Switch) both are the same.

  Source: Eq. 4 of arXiv:2101.03961 without its alpha.
  """
  if choices not in BALANCE_CHOICES:
    raise unknown('balance_choices', choices, BALANCE_CHOICES)
  E = router_probs.shape[-1]
  if choices == 'first':
    expert_index = expert_index[..., :1]
  real = mask.sum(-1, keepdims=True).astype(jnp.float32)  # [G, 1]
  real = jnp.maximum(real, 1.0)
  load = load_per_expert(expert_index, mask[..., None], E)  # [G, E]
  share = load / (real * expert_index.shape[-1])
  mean_prob = jnp.where(mask[..., None], router_probs, 0.0).sum(1) / real
  return E * (share * mean_prob).sum(-1)


class BalanceSums(NamedTuple):
  """Sums over each of U parts of a batch, from which balance losses are made.

  Attributes:
    load: float32 [U, E], the number of choices of each expert, before drops.
    prob: float32 [U, E], the sum of the real tokens' probabilities.
    tokens: float32 [U], the number of real tokens.
    num_choices: The number of choices of each token that the load counts.
  """

  load: Array
  prob: Array
  tokens: Array
  num_choices: int


@checked
def balance_sums(
  router_probs: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
  size: int,
  choices: str = 'all',
) -> BalanceSums:
  """The sums over each part of a batch, for `balance_of_parts`.

  A part is `size` consecutive tokens of a group; `size` divides S. The other
  arguments are those of `balance_loss`.
  """
  if choices == 'first':
    expert_index = expert_index[..., :1]
  probs, index, mask = (
    x.reshape(-1, size, *x.shape[2:])
    for x in (router_probs, expert_index, mask)
  )
  return BalanceSums(
    load_per_expert(index, mask[..., None], probs.shape[-1]),
    jnp.where(mask[..., None], probs, 0.0).sum(1),
    mask.sum(-1).astype(jnp.float32),
    index.shape[-1],
  )


def balance_of_parts(sums: BalanceSums, count: int) -> Float32[Array, '']:
  """The sum of balance losses, each over `count` consecutive parts of a batch.

  Each loss is multiplied by the number of real tokens in its parts, so that the
  sum divided by the number of all real tokens is the mean. The last loss may be
  over fewer parts.
  """

  def sum_parts(x):
    padding = -len(x) % count
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, count, *x.shape[1:]).sum(1)

  load, prob, tokens = map(sum_parts, sums[:3])
  E, real = load.shape[-1], jnp.maximum(tokens, 1.0)[:, None]
  share = load / (real * sums.num_choices)
  return (E * (share * prob / real).sum(-1) * tokens).sum()


@checked
def z_loss(
  router_logits: Float32[Array, 'G S E'], mask: Bool[Array, 'G S']
) -> Float32[Array, ' G']:
  """Mean over tokens of logsumexp(logits)^2; log(E)^2 for logits of zero.

  Source: Eq. 5 of arXiv:2202.08906.
  """
  square = token_z(router_logits)
  real = jnp.maximum(mask.sum(-1), 1).astype(jnp.float32)
  return jnp.where(mask, square, 0.0).sum(-1) / real


def token_z(router_logits: Float32[Array, '*G E']) -> Float32[Array, '*G']:
  """The squared logsumexp of each token's logits."""
  return jax.nn.logsumexp(router_logits, axis=-1) ** 2


@checked
def importance_loss(
  gate: Float32[Array, 'G S K'],
  expert_index: Int32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
  num_experts: int,
) -> Float32[Array, ' G']:
  """CV(Importance)^2, Importance = the sum of each expert's gates.

  The loss is 0 at perfect balance, and E/K - 1 when the same K experts take all
  tokens. The gates are those before any choice is dropped.

  Source: Eq. 6-7 of arXiv:1701.06538.
  """
  gate = jnp.where(mask[..., None], gate, 0.0)
  chosen = jax.nn.one_hot(expert_index, num_experts)  # [G, S, K, E]
  # An einsum is avoided, as accelerators would round its float32 factors.
  return cv_squared((gate[..., None] * chosen).sum((1, 2)))


@checked
def load_loss(
  probability: Float32[Array, 'G S E'], mask: Bool[Array, 'G S']
) -> Float32[Array, ' G']:
  """CV(Load)^2, Load = the sum over tokens of P(x, i), `load_probability`.

  Source: Eq. 10-11 of arXiv:1701.06538.
  """
  return cv_squared(jnp.where(mask[..., None], probability, 0.0).sum(1))


def cv_squared(x: Float32[Array, 'G E']) -> Float32[Array, ' G']:
  """The squared coefficient of variation, (std / mean)^2; 0 for all zeros."""
  mean = x.mean(-1)
  safe_mean = jnp.where(mean == 0, 1.0, mean)
  return jnp.where(mean == 0, 0.0, x.var(-1) / safe_mean**2)


def load_per_expert(
  expert_index: Int32[Array, 'G S K'],
  counted: Bool[Array, 'G S #K'],
  num_experts: int,
) -> Float32[Array, 'G E']:
  """The number of choices of each expert among those that `counted` marks."""
  chosen = jax.nn.one_hot(expert_index, num_experts)
  return jnp.where(counted[..., None], chosen, 0.0).sum((1, 2))


def over_groups(
  per_group: Float32[Array, ' G'], mask: Bool[Array, 'G S']
) -> Float32[Array, '']:
  """The sum over groups of a loss times the group's number of real tokens."""
  return (per_group * mask.sum(-1).astype(jnp.float32)).sum()
