"""The kind 'classify': how often is an example's class the largest output?

It is for models whose inputs are examples with a class each, those of 1991 and
2013. Not here: which of several texts is likeliest (`choice.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax import data
from moe_jax.distributed import Placing
from moe_jax.evaluation.scores import accuracy
from moe_jax.models import Model
from moe_jax.options import at_least, option
from moe_jax.runs.metrics import Row
from moe_jax.training.evaluate import EvaluationOptions, Setting, Variables


@dataclasses.dataclass(frozen=True)
class ClassifyEvaluation(EvaluationOptions):
  """The kind 'classify': the accuracy on examples that have a class."""

  every_steps: int = option(
    500,
    'Number of optimizer steps between two measurements; the evaluation also '
    'runs at the end of the run. With 0 it runs then alone.',
    at_least(0),
  )
  num_batches: int = option(
    0,
    'Number of batches, spread over the validation split; 0 takes all of it.',
    at_least(0),
  )

  def measure(self, setting: Setting) -> 'Classify':
    """Returns what measures the accuracy on the validation split.

    Raises:
      ValueError: The outputs of the model are tokens and no classes.
    """
    if not setting.model.reads_features:
      raise ValueError(
        f'{type(setting.model).__name__} tells tokens apart and no classes of '
        "examples; use kind 'loss' or 'choice'"
      )
    return Classify(
      model=setting.model,
      num_batches=self.num_batches,
      batch_size=setting.batch_size,
      rows=setting.dataset.splits['validation'],
      put=setting.put,
    )

  def shrunk(self) -> 'ClassifyEvaluation':
    """The same evaluation on one batch."""
    return dataclasses.replace(super().shrunk(), num_batches=1)


@dataclasses.dataclass(frozen=True)
class Classify:
  """Measures right answers on a split.

  Attributes:
    model: The model that is evaluated.
    num_batches: Number of batches; 0 takes all rows.
    batch_size: Number of rows in a global batch.
    rows: The split.
    put: Moves batches to the devices.
  """

  model: Model
  num_batches: int
  batch_size: int
  rows: data.Rows
  put: Placing

  def __call__(self, variables: Variables, step: int) -> Row:
    """The row of `scores.accuracy`; `chance` is one of V classes."""
    del step
    right = count = 0
    for batch in data.eval_batches(
      self.rows,
      batch_size=self.batch_size,
      num_batches=self.num_batches,
      share=self.put.rows,
    ):
      sums = _compiled(self.model)(variables, self.put.local(batch))
      right, count = right + int(sums[0]), count + int(sums[1])
    return accuracy(right, count, chance=1 / self.model.vocab_size)


@functools.lru_cache(maxsize=16)
def _compiled(model: Model):
  @jax.jit
  def run(variables, batch):
    """int32 [] each: the number of right answers, and of real examples."""
    outputs, _ = model.apply(variables, **model.inputs(batch))
    answer = jnp.argmax(model.class_scores(outputs), axis=-1)
    real = batch['segment_ids'][:, 0] > 0
    right = (answer == batch['targets'][:, 0]) & real
    return right.sum(), real.sum()

  return run
