"""The loss of distillation: hard labels mixed with a teacher's soft ones.

https://arxiv.org/abs/1503.02531, and section 4.2 of
https://arxiv.org/abs/2101.03961.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.models import Model
from moe_jax.models.base import Batch, TokenLosses, counted
from moe_jax.shapes import Array, Float32, Int


def soft_cross_entropy(
  outputs: Float32[Array, '*B V'],
  logits: Float32[Array, '*B L'],
  temperature: float = 1.0,
  ids: Int[Array, '*B L'] | None = None,
) -> Float32[Array, '*B']:
  """T^2 times the cross-entropy of softmax(logits / T), for each token.

  The square keeps the size of the gradient as the temperature T grows. The
  Kullback-Leibler divergence differs from this loss by the teacher's entropy,
  which has no gradient here.

  Args:
    outputs: The student's logits.
    logits: The teacher's logits or log-probabilities, through which no gradient
      flows.
    temperature: T.
    ids: The tokens that the logits are of, in any order; None: of all V. Tokens
      that are left out count as impossible.
  """
  labels = jax.nn.softmax(jax.lax.stop_gradient(logits) / temperature)
  log_probs = jax.nn.log_softmax(outputs / temperature)
  if ids is not None:
    log_probs = jnp.take_along_axis(log_probs, ids, axis=-1)
  return -(temperature**2) * (labels * log_probs).sum(-1)


def mixed(
  model: Model,
  hard_weight: float,
  soft_weight: float,
  soft: Callable[[Array, Batch], Array],
) -> Callable[[Any, Batch], TokenLosses]:
  """The loss hard_weight * hard + soft_weight * soft of a student.

  A part of weight 0 is not computed. Tokens of loss weight 0 count as zeros,
  as in the student's own loss.

  Args:
    model: The student.
    hard_weight: The weight of the student's own loss.
    soft_weight: The weight of `soft`.
    soft: The function (student's logits, batch) to the nats of each token.
  """

  def loss(outputs: Array, batch: Batch) -> TokenLosses:
    hard_loss = model.loss(outputs, batch)
    nats = [hard_weight * hard_loss.nats] if hard_weight else []
    if soft_weight:
      nats.append(soft_weight * soft(counted(outputs, batch), batch))
    return hard_loss._replace(nats=sum(nats[1:], nats[0]))

  return loss
