"""Early stopping: a run ends where an evaluation no longer gets better.

The state of early stopping is kept in the manifest of each checkpoint, so that
a resumed run goes on counting as if it had never been interrupted.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.config import Options, option
from moe_jax.devices import from_first
from moe_jax.runs.retention import CheckpointOptions

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


# Names of the attributes of `EarlyStopping` that a checkpoint keeps.
_KEPT = ('best', 'best_step', 'reference', 'count')


@dataclasses.dataclass
class EarlyStopping:
  """The measurements of a run that decide whether it ends.

  Every process has such an object, and follows the values of process 0.

  Attributes:
    options: The patience, and the least change that counts as better.
    checkpoint: The metric that is measured, and whether a higher one is better.
    best: The best value so far; None before the first that is finite.
    best_step: The step of the best value.
    reference: The last value that was better than the reference before it by
      more than `min_change`; None before the first that is finite.
    count: The number of measurements since the reference.
    had_ended: Whether the run had already ended at the checkpoint from which it
      goes on.
  """

  options: EarlyStoppingOptions
  checkpoint: CheckpointOptions
  best: float | None = None
  best_step: int = 0
  reference: float | None = None
  count: int = 0
  had_ended: bool = False

  @property
  def ended(self) -> bool:
    """Whether the run ends after the step that was measured last."""
    return 0 < self.options.patience <= self.count

  @property
  def _rule(self) -> dict[str, Any]:
    """The options by which values count as better, by name.

    A checkpoint keeps them, too, since its counts hold only for equal options.
    """
    return {
      'metric': self.checkpoint.best_name,
      'best_is_highest': self.checkpoint.best_is_highest,
      'min_change': self.options.min_change,
    }

  @property
  def extra(self) -> dict[str, Any]:
    """The state as a checkpoint keeps it; {} if there is no early stopping.

    The only key is `EXTRA`; its dict has `_rule`, the attributes that `_KEPT`
    names, and 'ended'.
    """
    if not self.options.patience:
      return {}
    counts = {name: getattr(self, name) for name in _KEPT}
    return {EXTRA: {**self._rule, **counts, 'ended': self.ended}}

  def restore(self, extra: Mapping[str, Any]) -> None:
    """Takes the counts from a checkpoint's extra values, if they still apply.

    They do not apply where the checkpoint has another metric, direction or
    least change than the options, as its counts are of other comparisons. Then
    nothing is taken, and the run counts anew.
    """
    stored = extra.get(EXTRA, {})
    if self._rule.items() <= stored.items():
      self.had_ended = stored['ended']
      for name in _KEPT:
        setattr(self, name, stored[name])

  def add(self, step: int, value: float | None) -> None:
    """Counts the measurement of a step; None, for no measurement, is ignored.

    A value that is not finite never counts as better. Every process has to call
    this, as all take the value of process 0.
    """
    if value is None or not self.options.patience:
      return
    value = from_first(value)
    if self._better(value, self.best, 0.0):
      self.best, self.best_step = value, step
    if self._better(value, self.reference, self.options.min_change):
      self.reference, self.count = value, 0
    else:
      self.count += 1

  def is_best(self, step: int) -> bool:
    """Whether a step has the best value so far; then its state is saved."""
    return self.best is not None and self.best_step == step

  def _better(self, value: float, before: float | None, change: float) -> bool:
    if before is None or not math.isfinite(value):
      return math.isfinite(value)
    sign = -1 if self.checkpoint.best_is_highest else 1
    return sign * value < sign * before - change

  def describe(self) -> str:
    """The reason for which the run has ended, as text."""
    best = 'never finite'
    if self.best is not None:
      best = f'best {self.best:.6g} at step {self.best_step}'
    return (
      f'{self.checkpoint.best_name} has not been better in {self.count} '
      f'evaluations, {best}'
    )
