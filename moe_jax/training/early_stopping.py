"""Early stopping: a run ends where an evaluation no longer gets better.

Its state is kept in the manifest of each checkpoint, so that a run that goes on
counts as if it had not been broken.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.config import Options, option
from moe_jax.devices import from_first
from moe_jax.runs.checkpointer import CheckpointOptions
from moe_jax.runs.metrics import Row

# The name under which a checkpoint has the state of early stopping.
EXTRA = 'early_stopping'


@dataclasses.dataclass(frozen=True)
class EarlyStoppingOptions(Options):
  """Options that say when a run ends before its last step."""

  patience: int = option(
    0,
    'Number of measurements of the evaluation checkpoint.best_eval, one after '
    'another, that may be no better than the best before; then the run ends, '
    'with all its evaluations. 0 never ends it before total_steps.',
    minimum=0,
  )
  min_change: float = option(
    0.0,
    'Number by which a measurement has to be better than the best before, to '
    'count as better; with 0 any improvement counts.',
    minimum=0,
  )

  def problems(self) -> Iterator[str]:
    if not self.patience:
      yield from self.in_vain('unless patience is at least 1')


@dataclasses.dataclass
class _State:
  """State of early stopping between two measurements, kept in checkpoints.

  Attributes:
    metric: The name of the metric that is measured.
    best_is_highest: Whether a higher value is better.
    min_change: The amount by which a value has to be better than `reference`.
    last_step: The step of the last measurement; 0 before the first.
    best: The best value so far; None before the first.
    best_step: The step of the best value.
    reference: The last value that was better than the reference before it by
      more than `min_change`; None before the first.
    count: The number of measurements since the reference.
    ended: Whether the run had ended when the state was saved.
  """

  metric: str
  best_is_highest: bool
  min_change: float
  last_step: int = 0
  best: float | None = None
  best_step: int = 0
  reference: float | None = None
  count: int = 0
  ended: bool = False


class EarlyStopping:
  """The measurements of a run that decide whether it ends.

  Every process has such an object, and follows the values of process 0.
  """

  def __init__(
    self, options: EarlyStoppingOptions, checkpoint: CheckpointOptions
  ):
    self._options = options
    self._checkpoint = checkpoint
    self._state = _State(
      checkpoint.best_name, checkpoint.best_is_highest, options.min_change
    )

  @property
  def ended(self) -> bool:
    """Whether the run ends after the step that was measured last."""
    return 0 < self._options.patience <= self._state.count

  @property
  def ends_now(self) -> bool:
    """Whether a run that had not ended when it was saved ends when restored.

    It does so if it has less patience than when the checkpoint was saved.
    """
    return self.ended and not self._state.ended

  @property
  def extra(self) -> dict[str, Any]:
    """The state as a checkpoint keeps it; {} if there is no early stopping."""
    if not self._options.patience:
      return {}
    return {EXTRA: dataclasses.asdict(self._state) | {'ended': self.ended}}

  def restore(self, extra: Mapping[str, Any]) -> None:
    """Goes on with the state in a checkpoint's extra values, or counts anew.

    It counts anew where another metric decides, or another rule says which
    value is better, since the stored counts are of other comparisons.
    """
    stored = extra.get(EXTRA, {})
    rule = ('metric', 'best_is_highest', 'min_change')
    if all(stored.get(name) == getattr(self._state, name) for name in rule):
      self._state = _State(**stored)

  def add(self, step: int, rows: Mapping[str, Row]) -> None:
    """Takes the metrics of the evaluations after a step, by evaluation's name.

    A value that is not finite never counts as better. Every process calls
    this.

    Raises:
      ValueError: The row of `checkpoint.best_eval` lacks the metric.
    """
    value = self._checkpoint.best_of(rows)
    if value is None or not self._options.patience:
      return
    value, state = from_first(value), self._state
    state.last_step = step
    if self._better(value, state.best, 0.0):
      state.best, state.best_step = value, step
    if self._better(value, state.reference, state.min_change):
      state.reference, state.count = value, 0
    else:
      state.count += 1

  def is_best(self, step: int) -> bool:
    """Whether a step has the best value so far; then its state is saved."""
    return self._state.best is not None and self._state.best_step == step

  def _better(self, value: float, before: float | None, change: float) -> bool:
    if before is None or not math.isfinite(value):
      return math.isfinite(value)
    sign = -1 if self._state.best_is_highest else 1
    return sign * value < sign * before - change

  def describe(self) -> str:
    """The reason for which the run has ended, as text."""
    state = self._state
    best = 'never finite'
    if state.best is not None:
      best = f'best {state.best:.6g} at step {state.best_step}'
    return (
      f'{state.metric} has not been better in {state.count} evaluations, {best}'
    )


def has_ended(extra: Mapping[str, Any]) -> bool:
  """Whether a run ended early at a checkpoint with these extra values."""
  return bool(extra.get(EXTRA, {}).get('ended'))
