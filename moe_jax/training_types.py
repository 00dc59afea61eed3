"""What a training step takes and reports, for all who read or write it.

Not here: how the sums come to be (`training/losses.py`) and the step itself
(`training/step.py`).
"""

from typing import NamedTuple

import jax

from moe_jax.routing import MoeAux
from moe_jax.shapes import Array

Batch = dict[str, Array]


class LossSums(NamedTuple):
  """Sums over tokens; add two to merge them.

  Attributes:
    cross_entropy: float32 [], sum of nats times loss weights.
    weight: float32 [], sum of loss weights.
    logits_z: float32 [], sum of squared logsumexps of logits times weights.
    aux: The layers' aux, every leaf [L, ...].
  """

  cross_entropy: Array
  weight: Array
  logits_z: Array
  aux: MoeAux


class StepMetrics(NamedTuple):
  """What a step reports.

  Attributes:
    loss: float32 [], what was minimised.
    sums: Of the batch.
    grad_norm: float32 [], before clipping.
    learning_rate: float32 [], of this step, before rules by name.
  """

  loss: Array
  sums: LossSums
  grad_norm: Array
  learning_rate: Array


def add(a: LossSums, b: LossSums) -> LossSums:
  """Merges two sums."""
  return jax.tree.map(lambda x, y: x + y, a, b)
