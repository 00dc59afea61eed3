"""Balancing without a loss: a bias on each expert's score, moved by its load.

Loss-Free Balancing, https://arxiv.org/abs/2408.15664. The bias decides who is
chosen and never what a choice weighs, so it has no gradient. Not here: where
it is kept (the collection `router_state`), and when it moves
(`moe_jax.training.step`).
"""

import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Float32, Leaf


def biased_scores(
  router_logits: Float32[Array, 'G S E'], bias: Float32[Array, ' E'], gates: str
) -> Float32[Array, 'G S E']:
  """What tokens choose by: the gate before any renormalisation, plus the bias.

  Source: Eq. 3 of arXiv:2408.15664, whose gates are 'sigmoid'.
  """
  if gates == 'sigmoid':
    scores = jax.nn.sigmoid(router_logits)
  else:
    scores = jax.nn.softmax(router_logits)
  return scores + bias[None, None]


def moved(
  bias: Float32[Array, '*L E'], load: Float32[Array, '*L E'], rate: Leaf
) -> Float32[Array, '*L E']:
  """The bias after a step: up by `rate` below the mean load, down above.

  Source: Algorithm 1 of arXiv:2408.15664.

  Args:
    bias: Of each expert.
    load: Choices per expert before drops, of the whole batch.
    rate: u of the paper, 0.001 there; a bias moves at most rate * steps, so
      short runs need a larger one.
  """
  return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
