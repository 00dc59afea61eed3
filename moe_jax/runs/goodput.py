"""Goodput: the share of a run's wall time that its steps take.

All other time is counted by its cause. All times are of process 0.
"""

import time
from collections.abc import Mapping
from typing import Any

STEPS = 'steps'
# What a run spends time on besides its steps:
# - 'compile': hooks that begin, and the first step of each process;
# - 'data': waiting for a batch while no step is computed;
# - 'evaluation' and 'checkpoint': steps wait for them;
# - 'restart': set-up and restore of each process; where a run goes on, all time
#   since the last row of metrics that was kept, so also the time of the steps
#   that are taken again.
CAUSES = ('compile', 'data', 'evaluation', 'checkpoint', 'restart')


_START = time.time() - time.perf_counter()


def now() -> float:
  """Seconds since 1970, by a clock that never goes back within a process."""
  return _START + time.perf_counter()


class Goodput:
  """Counts a run's seconds by cause, those of earlier processes included.

  A cause is one of `CAUSES`, or `STEPS`.
  """

  def __init__(self, last: Mapping[str, Any], begun: float):
    """Begins to count at the cause 'restart', from the seconds counted so far.

    Args:
      last: The last row of the run's metrics that has a goodput, which holds
        the seconds counted so far; {} where a run begins.
      begun: The time of `now` at which the process began with the run.
    """
    self._cause = 'restart'
    total = last.get('train/run_seconds', 0.0)
    self._seconds = {
      cause: total * last.get(f'train/lost_to_{cause}', 0.0) for cause in CAUSES
    }
    self._seconds[STEPS] = total * last.get('train/goodput', 0.0)
    self._since = last.get('train/time', begun)

  @property
  def busy_seconds(self) -> float:
    """Seconds that steps have taken, with their waits for data, so far."""
    self.turn_to(self._cause)
    return self._seconds[STEPS] + self._seconds['data']

  def turn_to(self, cause: str) -> str:
    """Counts time from now on for `cause`; returns the cause before it."""
    before, moment = self._cause, now()
    self._seconds[before] += moment - self._since
    self._cause, self._since = cause, moment
    return before

  def move(self, seconds: float, source: str, target: str) -> None:
    """Counts seconds for the cause `target` that were counted for `source`."""
    self._seconds[source] -= seconds
    self._seconds[target] += seconds

  def row(self) -> dict[str, float]:
    """A row of metrics with the run's seconds and each cause's share of them.

    `goodput` is the share of steps, and `lost_to_<cause>` those of `CAUSES`;
    they add up to 1. `run_seconds` are the seconds so far, and `time` is now,
    in seconds since 1970.
    """
    self.turn_to(self._cause)
    total = sum(self._seconds.values())
    shares = {c: n / max(total, 1e-9) for c, n in self._seconds.items()}
    return {
      'goodput': shares.pop(STEPS),
      **{f'lost_to_{cause}': share for cause, share in shares.items()},
      'run_seconds': total,
      'time': self._since,
    }
