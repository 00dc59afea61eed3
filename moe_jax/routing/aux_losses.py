"""The balancing losses of the literature, one function per equation.

Losses are of real tokens alone, and unweighted. `balance_loss`, `z_loss`,
`importance_loss` and `load_loss` return the loss of each group, float32 [G], 0
in a group without real tokens; `over_groups`, `balance_of_rows` and
`choice_losses` return sums over groups, each weighted by its real tokens.
"""

import math
from collections.abc import Mapping

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


@checked
def balance_of_rows(
  router_probs: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
  row_length: int,
  rows: Mapping[str, int],
  choices: str = 'all',
) -> dict[str, Float32[Array, '']]:
  """The balance losses of sets of consecutive sequences, whatever groups are.

  A sequence is a row of the batch. The result has each loss by its name in
  `rows`, a sum over sets. The loss of each set is multiplied by its number of
  real tokens, so that the sum divided by the number of all is the mean.

  Args:
    router_probs: The softmax of the logits over all experts.
    expert_index: The chosen experts, before any choice is dropped.
    mask: False for padding.
    row_length: T, the number of tokens of a sequence; a group is a part of a
      sequence, or several sequences.
    rows: The number of sequences of a set, by the name of the loss in the
      result; the last set may have fewer.
    choices: 'all' counts all K choices, 'first' only the largest.
  """
  if choices == 'first':
    expert_index = expert_index[..., :1]
  # Tokens are cut into parts, each of which lies in one row and in one group.
  size = math.gcd(mask.shape[1], row_length)
  probs, index, mask = (
    x.reshape(-1, size, *x.shape[2:])
    for x in (router_probs, expert_index, mask)
  )
  E, K = probs.shape[-1], index.shape[-1]
  sums = (
    load_per_expert(index, mask[..., None], E),
    jnp.where(mask[..., None], probs, 0.0).sum(1),
    mask.sum(-1).astype(jnp.float32),
  )

  def loss(count):
    """The sum over sets of `count` parts of sequences: loss times real tokens.

    The parts are those into which the tokens were cut above.
    """

    def sum_parts(x):
      padding = -len(x) % count
      x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
      return x.reshape(-1, count, *x.shape[1:]).sum(1)

    load, prob, tokens = map(sum_parts, sums)
    real = jnp.maximum(tokens, 1.0)[:, None]
    share = load / (real * K)
    return (E * (share * prob / real).sum(-1) * tokens).sum()

  return {name: loss(n * row_length // size) for name, n in rows.items()}


def balance_probs(
  logits: Float32[Array, '*G E'], scores: str
) -> Float32[Array, '*G E']:
  """The probabilities whose means the balance loss multiplies with loads.

  Args:
    logits: The logits.
    scores: 'softmax' over experts, or 'sigmoid': the sigmoid of each logit,
      divided by the sum of all sigmoids of the token.
  """
  if scores == 'sigmoid':
    logits = jax.nn.log_sigmoid(logits)
  return jax.nn.softmax(logits)


@checked
def z_loss(
  router_logits: Float32[Array, 'G S E'], mask: Bool[Array, 'G S']
) -> Float32[Array, ' G']:
  """Mean over real tokens of logsumexp(logits)^2; log(E)^2 for zero logits.

  Tokens are real where the mask is True.

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

  CV is the standard deviation over experts, divided by the mean. The loss is 0
  at perfect balance, and E/K - 1 when the same K experts take all tokens with
  equal gates. The gates are those before any choice is dropped; those of
  padding, where the mask is False, do not count.

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
  """CV(Load)^2, where Load sums P(x, i) over the real tokens of a group.

  CV is the standard deviation over experts, divided by the mean.

  Args:
    probability: P(x, i), the chance that expert i is chosen, as
      `load_probability` returns it.
    mask: False for padding.

  Source: Eq. 10-11 of arXiv:1701.06538.
  """
  return cv_squared(jnp.where(mask[..., None], probability, 0.0).sum(1))


def cv_squared(x: Float32[Array, 'G E']) -> Float32[Array, ' G']:
  """(std / mean)^2 over experts, for each group; 0 for a group of zeros."""
  mean = x.mean(-1)
  safe_mean = jnp.where(mean == 0, 1.0, mean)
  return jnp.where(mean == 0, 0.0, x.var(-1) / safe_mean**2)


def load_per_expert(
  expert_index: Int32[Array, 'G S K'],
  counted: Bool[Array, 'G S #K'],
  num_experts: int,
) -> Float32[Array, 'G E']:
  """Each group's number of choices of each expert where `counted` is True."""
  chosen = jax.nn.one_hot(expert_index, num_experts)
  return jnp.where(counted[..., None], chosen, 0.0).sum((1, 2))


def over_groups(
  per_group: Float32[Array, ' G'], mask: Bool[Array, 'G S']
) -> Float32[Array, '']:
  """The sum over groups of a loss times the group's number of real tokens."""
  return (per_group * mask.sum(-1).astype(jnp.float32)).sum()


@checked
def choice_losses(
  logits: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'],
  gate: Float32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
  balance_choices: str,
  balance_scores: str = 'softmax',
) -> dict[str, Float32[Array, '']]:
  """The losses of tokens' choices: balance loss, z-loss and importance loss.

  Their names are 'balance_loss', 'z_loss' and 'importance_loss'. Each is summed
  over groups, times the number of real tokens of the group.

  Args:
    logits: The logits without noise, of which balance loss and z-loss are made.
    expert_index: The chosen experts.
    gate: The gates of the choices, as if all were served.
    mask: False for padding.
    balance_choices: 'all' lets the balance loss count all K choices, 'first'
      only the largest.
    balance_scores: The function from logits to the probabilities of the balance
      loss: 'softmax', or 'sigmoid', divided by the sum over all experts.
  """
  E, probs = logits.shape[-1], balance_probs(logits, balance_scores)
  balance = balance_loss(probs, expert_index, mask, balance_choices)
  importance = importance_loss(gate, expert_index, mask, E)
  return {
    'balance_loss': over_groups(balance, mask),
    'z_loss': over_groups(z_loss(logits, mask), mask),
    'importance_loss': over_groups(importance, mask),
  }
