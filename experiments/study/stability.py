"""Stability of a run by its training losses.

A run that is judged logs every step (`log_every_steps=1`) and leaves out steps
that are not finite.
"""

from collections.abc import Sequence

import ml_collections
import numpy as np

from experiments.study.parts import POSITIVE, SHARE, Column
from moe_jax.runs import metrics, recorder
from moe_jax.training.setup import Run

# A step is compared with so many steps before it.
_WINDOW = 20
# Deviations above the median of these steps from which on a step is a spike: in
# normal noise one of a billion is as far.
_DEVIATIONS = 6.0
_NORMAL = 1.4826  # deviation of a normal distribution over the median one
STABLE = Column(
  'stable', 'stable', '% of runs', 0, lambda x: 100 * x, bounds=SHARE
)
SPIKES = Column('spikes', 'spikes', 'steps a run', 1, bounds=POSITIVE)
RISE = Column('largest rise', 'rise', 'nats/byte', 2, bounds=POSITIVE)
COLUMNS = (STABLE, SPIKES, RISE)
MEANING = (
  'A run is stable if all its steps are finite and the mean loss of its last '
  'tenth is below that of each tenth of its first half. A spike is a step '
  'whose training loss is six robust deviations above the median of the twenty '
  'steps before. The largest rise is that of a training loss over the lowest '
  'one before it.'
)


def tolerant(config: ml_collections.ConfigDict) -> None:
  """Changes a config so that its runs can be judged, and end in any case."""
  config.log_every_steps = 1
  config.max_nonfinite_steps = config.total_steps


def measure(run: Run) -> dict[str, float]:
  """The numbers of `COLUMNS` of a run that has ended."""
  rows = metrics.read_metrics(run.workdir / metrics.FILE_NAME)
  losses = [row['train/loss'] for row in rows if 'train/loss' in row]
  skipped = len(recorder.kept_steps(run.workdir))
  return {
    'stable': float(is_stable(losses, skipped)),
    'spikes': float(spikes(losses) + skipped),
    'rise': largest_rise(losses),
  }


def is_stable(losses: Sequence[float], skipped: int = 0) -> bool:
  """Whether a run was stable; see `MEANING`.

  Args:
    losses: Training losses of the finite steps, in order.
    skipped: Number of steps that were not finite.
  """
  if skipped or len(losses) < 2:
    return not skipped
  tenths = [t.mean() for t in np.array_split(losses, min(10, len(losses)))]
  return bool(tenths[-1] < min(tenths[: len(tenths) // 2]))


def spikes(losses: Sequence[float]) -> int:
  """The number of steps whose loss jumps out of those before; see `MEANING`."""
  if len(losses) <= _WINDOW:
    return 0
  windows = np.lib.stride_tricks.sliding_window_view(losses, _WINDOW)[:-1]
  median = np.median(windows, axis=1)
  spread = np.median(np.abs(windows - median[:, None]), axis=1)
  above = np.asarray(losses[_WINDOW:]) - median
  return int((above > _DEVIATIONS * _NORMAL * spread).sum())


def largest_rise(losses: Sequence[float]) -> float:
  """The largest rise of a loss over the lowest one before it."""
  if not losses:
    return 0.0
  return float((losses - np.minimum.accumulate(losses)).max())
