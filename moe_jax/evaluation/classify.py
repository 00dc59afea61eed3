"""The kind 'classify': how often the largest output is an example's class.

It is for models whose inputs are examples with a class each, those of 1991 and
2013. Not here: choosing the likeliest of several texts (`choice.py`).
"""

import dataclasses
import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp

from moe_jax.data import DataOptions
from moe_jax.errors import InputError
from moe_jax.evaluation.scores import ACCURACY, accuracy
from moe_jax.models import Model
from moe_jax.runs.metrics import Row
from moe_jax.training.evaluate import (
  BatchesEvaluation,
  OverBatches,
  Setting,
  Variables,
  behind,
  between_batches,
)
from moe_jax.training.step import over_slices


@dataclasses.dataclass(frozen=True)
class ClassifyEvaluation(BatchesEvaluation):
  """The kind 'classify': the accuracy on examples that have a class."""

  def measure(self, setting: Setting) -> 'Classify':
    """Returns the function that measures accuracy on the validation split.

    Raises:
      ValueError: The model's outputs are tokens and not classes.
    """
    if not setting.model.reads_features:
      raise InputError(
        f'{type(setting.model).__name__} predicts tokens and no classes of '
        "examples; use kind 'loss' or 'choice'"
      )
    return Classify.of(setting, self.num_batches)

  def row_names(self, data: DataOptions) -> Collection[str]:
    """See `EvaluationOptions.row_names`."""
    del data
    return ACCURACY


class Classify(OverBatches):
  """Measures the accuracy of a classifier."""

  def __call__(self, variables: Variables, step: int) -> Row:
    """The row of `scores.accuracy`; `chance` is one of V classes."""
    del step
    run = _compiled(self.model, self.put.microbatches)
    right = count = 0

    def sums_of(batch):
      between_batches()
      return run(variables, batch)

    for sums in behind(map(sums_of, self.batches())):
      right, count = right + int(sums[0]), count + int(sums[1])
    return accuracy(right, count, chance=1 / self.model.vocab_size)


@functools.lru_cache(maxsize=16)
def _compiled(model: Model, microbatches: int):
  """A function for the numbers of right answers and of real examples."""

  def of_slice(variables, index, batch):
    outputs, _ = model.apply(variables, **model.inputs(batch))
    answer = jnp.argmax(model.class_scores(outputs), axis=-1)
    is_real = batch['segment_ids'][:, 0] > 0
    is_right = (answer == batch['targets'][:, 0]) & is_real
    return (is_right.sum(), is_real.sum()), None

  @jax.jit
  def run(variables, batch):
    function = functools.partial(of_slice, variables)
    return over_slices(function, batch, microbatches)[0]

  return run
