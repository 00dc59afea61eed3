"""Types of the batch and the metrics of a training step."""

from typing import Any, NamedTuple

import jax

from moe_jax.routing import MoeAux
from moe_jax.shapes import Array, Bool

Batch = dict[str, Array]


class LossSums(NamedTuple):
  """Sums over the tokens of a batch; `add` merges those of two.

  Attributes:
    cross_entropy: float32 [], sum of nats times loss weights.
    weight: float32 [], sum of loss weights.
    logits_z: float32 [], sum of squared logsumexps of logits times weights.
    aux: Losses and statistics of the layers' routers, every leaf [L, ...].
    choices: The choices of the batch's tokens where the step records them, no
      sums; see `moe_jax.models.recorded.Choices`.
  """

  cross_entropy: Array
  weight: Array
  logits_z: Array
  aux: MoeAux
  choices: Any = None


class StepMetrics(NamedTuple):
  """Metrics of one optimizer step.

  Attributes:
    loss: float32 [], the loss that was minimised.
    sums: Sums over the batch.
    grad_norm: float32 [], the norm of the gradient before clipping.
    learning_rate: float32 [], the learning rate before factors by name.
    finite: bool [N], whether each floating-point leaf of the state after the
      step is finite, in the order of `moe_jax.runs.finite.names`.
  """

  loss: Array
  sums: LossSums
  grad_norm: Array
  learning_rate: Array
  finite: Bool[Array, ' N']


def add(a: LossSums, b: LossSums) -> LossSums:
  """Merges two sums."""
  return jax.tree.map(lambda x, y: x + y, a, b)
