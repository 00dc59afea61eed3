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

# (the student's logits, batch) -> nats of the soft labels, for each token.
SoftLoss = Callable[[Array, Batch], Array]
# Names under which a batch has the teacher's largest logits.
IDS, LOG_PROBS = 'teacher_ids', 'teacher_log_probs'


def soft_cross_entropy(
  outputs: Float32[Array, '*B V'],
  logits: Float32[Array, '*B V'],
  temperature: float = 1.0,
) -> Float32[Array, '*B']:
  """T^2 times the cross-entropy of softmax(logits / T), for each token.

  The square keeps the size of the gradient as the temperature T grows. The
  Kullback-Leibler divergence differs from this loss by the teacher's entropy,
  which has no gradient here.

  Args:
    outputs: The student's logits.
    logits: The teacher's logits, through which no gradient flows.
    temperature: T.
  """
  labels = jax.nn.softmax(jax.lax.stop_gradient(logits) / temperature)
  log_probs = jax.nn.log_softmax(outputs / temperature)
  return -(temperature**2) * (labels * log_probs).sum(-1)


def kept_cross_entropy(
  outputs: Float32[Array, '*B V'],
  ids: Int[Array, '*B top'],
  log_probs: Float32[Array, '*B top'],
  temperature: float = 1.0,
) -> Float32[Array, '*B']:
  """`soft_cross_entropy` of the tokens that a teacher finds most likely.

  Their probabilities are scaled up to a sum of one, so that tokens which were
  left out count as impossible. Where all V are kept, the loss is the same.

  Args:
    outputs: The student's logits.
    ids: The tokens, in any order.
    log_probs: Their logarithmic probabilities, or logits.
    temperature: T.
  """
  labels = jax.nn.softmax(jax.lax.stop_gradient(log_probs) / temperature)
  student_log_probs = jax.nn.log_softmax(outputs / temperature)
  student_log_probs = jnp.take_along_axis(student_log_probs, ids, axis=-1)
  return -(temperature**2) * (labels * student_log_probs).sum(-1)


def mixed(
  model: Model, hard_weight: float, soft_weight: float, soft: SoftLoss
) -> Callable[[Any, Batch], TokenLosses]:
  """The loss hard_weight * hard + soft_weight * soft of a student.

  A part of weight 0 is not computed. Tokens of loss weight 0 count as zeros,
  as in the student's own loss.

  Args:
    model: The student.
    hard_weight: The weight of the student's own loss.
    soft_weight: The weight of `soft`.
    soft: The loss of soft labels.
  """

  def loss(outputs: Array, batch: Batch) -> TokenLosses:
    hard_loss = model.loss(outputs, batch)
    nats = [hard_weight * hard_loss.nats] if hard_weight else []
    if soft_weight:
      nats.append(soft_weight * soft(counted(outputs, batch), batch))
    return hard_loss._replace(nats=sum(nats[1:], nats[0]))

  return loss


def computed_beside(
  teacher: Model, variables: Any, temperature: float
) -> SoftLoss:
  """The soft loss with the teacher's logits, computed for the same batch.

  The teacher's dropout and its routers' noise are off; tokens that its capacity
  drops in its evaluation are dropped here, too.

  Args:
    teacher: The teacher.
    variables: The teacher's variables, which are not differentiated.
    temperature: The temperature of the labels.
  """

  def soft(outputs: Array, batch: Batch) -> Array:
    logits, _ = teacher.apply(variables, **teacher.inputs(batch))
    return soft_cross_entropy(outputs, counted(logits, batch), temperature)

  return soft


def read_from_batch(temperature: float) -> SoftLoss:
  """The soft loss with the teacher's largest logits, which batches hold."""

  def soft(outputs: Array, batch: Batch) -> Array:
    return kept_cross_entropy(
      outputs, batch[IDS], batch[LOG_PROBS], temperature
    )

  return soft
