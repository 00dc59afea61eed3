"""Balancing without a loss: each expert's score has a bias that its load moves.

Loss-Free Balancing, https://arxiv.org/abs/2408.15664. The bias decides which
experts are chosen and never enters into their gates, so it has no gradient.
"""

import jax
import jax.numpy as jnp

from moe_jax.config import unknown
from moe_jax.shapes import Array, Float32, Leaf, checked

SCORES = ('sigmoid', 'softmax')
RULES = ('sign', 'error')


@checked
def scores_of(
  router_logits: Float32[Array, 'G S E'], scores: str
) -> Float32[Array, 'G S E']:
  """The scores of experts, to which a balancing bias can be added.

  DeepSeek's rules also rate groups of experts by these scores.

  Args:
    router_logits: The logits that the scores are computed from.
    scores: One of `SCORES`, the function of the logits: 'sigmoid' of each logit
      by itself, or 'softmax' over all experts.
  """
  if scores not in SCORES:
    raise unknown('scores', scores, SCORES)
  return getattr(jax.nn, scores)(router_logits)


@checked
def biased_scores(
  router_logits: Float32[Array, 'G S E'],
  bias: Float32[Array, ' E'],
  scores: str,
) -> Float32[Array, 'G S E']:
  """The scores by which tokens choose: each expert's score plus its bias.

  Args:
    router_logits: The logits that the scores are computed from.
    bias: The bias of each expert.
    scores: One of `SCORES`, the function of the logits: 'sigmoid' of each logit
      by itself, or 'softmax' over all experts.

  Source: Eq. 3 of arXiv:2408.15664, whose scores are 'sigmoid'; its Appendix C
  has 'softmax'.
  """
  return scores_of(router_logits, scores) + bias[None, None]


@checked
def moved(
  bias: Float32[Array, '*L E'],
  load: Float32[Array, '*L E'],
  rate: Leaf,
  rule: str = 'sign',
) -> Float32[Array, '*L E']:
  """The bias after a step: it rises below the mean load and falls above it.

  Source: Algorithm 1 of arXiv:2408.15664 for 'sign', and its Table 3 for
  'error'. The paper does not give the unit of its error; here it is relative to
  the mean load, so that the same rate suits batches of any size.

  Args:
    bias: The bias of each expert before the step.
    load: The number of choices of each expert in the whole batch, before drops.
    rate: The paper's u, 0.001 there. By the rule 'sign' a bias moves by at most
      rate * steps in a run, so short runs need a larger rate.
    rule: One of `RULES`: 'sign' moves the bias by the rate, 'error' by the rate
      times (mean load - load) / mean load.
  """
  if rule not in RULES:
    raise unknown('rule', rule, RULES)
  mean = load.mean(-1, keepdims=True)
  error = mean - load
  if rule == 'sign':
    return bias + rate * jnp.sign(error)
  # Without any real token the mean load is 0, and 0 / 0 would be NaN.
  return bias + rate * error / jnp.maximum(mean, 1.0)
