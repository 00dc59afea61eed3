"""Balancing without a loss: a bias on each expert's score, moved by its load.

Loss-Free Balancing, https://arxiv.org/abs/2408.15664. The bias decides who is
chosen and never what a choice weighs, so it has no gradient. Not here: where
the bias is kept (the collection `router_state`), and when it is updated
(`moe_jax.training.step`).
"""

import jax
import jax.numpy as jnp

from moe_jax.options import unknown
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float32, Leaf

SCORES = ('sigmoid', 'softmax')


@checked
def scores_of(
  router_logits: Float32[Array, 'G S E'], scores: str
) -> Float32[Array, 'G S E']:
  """The scores that a bias is added to, and that rate groups of experts.

  Args:
    router_logits: The logits that the scores are computed from.
    scores: One of `SCORES`, the function of the logits: 'sigmoid' of each by
      itself, or 'softmax' over all experts.
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
    scores: One of `SCORES`; see `scores_of`.

  Source: Eq. 3 of arXiv:2408.15664, whose scores are 'sigmoid'; its Appendix C
  has 'softmax'.
  """
  return scores_of(router_logits, scores) + bias[None, None]


@checked
def moved(
  bias: Float32[Array, '*L E'], load: Float32[Array, '*L E'], rate: Leaf
) -> Float32[Array, '*L E']:
  """The bias after a step: up by `rate` below the mean load, down above.

  Source: Algorithm 1 of arXiv:2408.15664.

  Args:
    bias: The bias of each expert before the step.
    load: The choices of each expert before drops, of the whole batch.
    rate: The paper's u, 0.001 there; a bias moves at most rate * steps, so
      short runs need a larger one.
  """
  return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
