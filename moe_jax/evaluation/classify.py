"""The kind 'classify': how often is an example's class the largest output?

Of models whose inputs are examples with a class each, those of 1991 and 2013.
Not here: which of several texts is likeliest (`choice.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax import data
from moe_jax.config import to_dataclass
from moe_jax.distributed import Placing
from moe_jax.evaluation.scores import accuracy
from moe_jax.models import Model
from moe_jax.runs.metrics import Row
from moe_jax.training.evaluate import LossOptions, Setting, Variables


def make(setting: Setting) -> 'Classify':
  """What measures the entry, whose keys are those of the kind 'loss'.

  Raises:
    ValueError: A key is unknown, missing or out of range; or the model says no
      classes.
  """
  options = to_dataclass(LossOptions, setting.options)
  if not hasattr(setting.model, 'class_scores'):
    raise ValueError(
      f"kind 'classify' of model.kind={setting.config.model.kind!r}, which "
      "says tokens and no classes; use 'loss' or 'choice'"
    )
  return Classify(
    model=setting.model,
    num_batches=options.num_batches,
    batch_size=setting.config.batch_size,
    rows=setting.dataset.splits['validation'],
    put=setting.put,
  )


@dataclasses.dataclass(frozen=True)
class Classify:
  """Measures right answers on the validation split.

  Attributes:
    model: What is evaluated.
    num_batches: 0 is all rows.
    batch_size: B, global.
    rows: The split.
    put: Moves batches to devices.
  """

  model: Model
  num_batches: int
  batch_size: int
  rows: data.Rows
  put: Placing

  def __call__(self, variables: Variables, step: int) -> Row:
    """See `scores.accuracy`; `chance` is that of V classes."""
    del step
    right = count = 0
    for batch in data.eval_batches(
      self.rows,
      batch_size=self.batch_size,
      num_batches=self.num_batches,
      share=self.put.rows,
    ):
      found = _compiled(self.model)(variables, self.put.local(batch))
      right, count = right + int(found[0]), count + int(found[1])
    return accuracy(right, count, chance=1 / self.model.config.vocab_size)


@functools.lru_cache(maxsize=16)
def _compiled(model: Model):
  @jax.jit
  def run(variables, batch):
    """int32 [], right answers and real examples."""
    outputs, _ = model.apply(variables, **model.inputs(batch))
    answer = jnp.argmax(model.class_scores(outputs), axis=-1)
    real = batch['segment_ids'][:, 0] > 0
    right = (answer == batch['targets'][:, 0]) & real
    return right.sum(), real.sum()

  return run
