"""Batches that a model reads in memory: losses of tokens beside their experts.

    for read in reading.readings(model, variables, batches):
      read.nats  # [B, T]
      read.record().layers[3].expert  # [B, T, K]

Not here: choices while a run trains, and their files (`recording.py`).
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from moe_jax.analysis.recording import records_of
from moe_jax.analysis.trace_records import Record
from moe_jax.errors import InputError
from moe_jax.models import Model
from moe_jax.models.recorded import Choices, recording
from moe_jax.shapes import Array, Leaf

KIND = 'read'


class Reading(NamedTuple):
  """A batch that a model has read.

  Attributes:
    nats: float32 [B, T], the loss at each token of the last sequence, which is
      that of the token after it in a decoder.
    weights: float32 [B, T], the weight of each of these losses; 0 at padding
      and where nothing is predicted.
    records: The choices of experts, a record for each sequence that sparse
      layers see, of the kind 'read'.
  """

  nats: np.ndarray
  weights: np.ndarray
  records: tuple[Record, ...]

  def record(self, sequence: str = '') -> Record:
    """The record of one sequence, '' or 'encoder'.

    Raises:
      ValueError: No sparse layer sees the sequence.
    """
    for record in self.records:
      if record.sequence == sequence:
        return record
    sequences = [record.sequence for record in self.records]
    raise InputError(f'no sparse layer sees {sequence!r}, only {sequences}')


def readings(
  model: Model,
  variables: Mapping[str, Any],
  batches: Iterable[Mapping[str, Leaf]],
  *,
  step: int = 0,
) -> Iterator[Reading]:
  """The losses and choices of a model on batches, one after the other.

  Dropout and noise are off, and choices are dropped as in an evaluation.

  Args:
    model: The model.
    variables: Its variables.
    batches: Batches of its data.
    step: The number of optimizer steps that made the variables, for records.
  """
  for number, batch in enumerate(batches):
    nats, choices = jax.device_get(_read(model, variables, batch))
    records = records_of(model, KIND, step, number, batch, choices)
    weights = np.asarray(batch['loss_weights'], np.float32)
    yield Reading(nats, weights, tuple(records))


@functools.partial(jax.jit, static_argnames='model')
def _read(
  model: Model, variables: Mapping[str, Any], batch: Mapping[str, Leaf]
) -> tuple[Float[Array, 'B T'], Choices]:
  (outputs, _), choices = recording(
    model, dict(variables), dtype='float32', **model.inputs(batch)
  )
  return model.loss(outputs, batch).nats, choices
