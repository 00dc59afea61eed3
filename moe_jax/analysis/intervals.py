"""Means over seeds with their confidence intervals."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

# The smallest and the largest value that a number may have; None for no bound.
Bounds = Sequence[float | None] | None


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean over seeds with the half width of its 95 % confidence interval.

  The interval is Student's; with a single seed it is infinite.
  """

  mean: float
  half_width: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Interval':
    """The interval for the mean of `values`, which has one value a seed."""
    n = len(values)
    if n < 2:
      return cls(float(np.mean(values)), float('inf'))
    error = np.std(values, ddof=1) / np.sqrt(n)
    return cls(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * error))

  def ends(self, bounds: Bounds = None) -> tuple[float, float]:
    """Both ends of the interval, cut to the values that the number may have.

    Args:
      bounds: The smallest and the largest value that the number may have; None
        for no bound. A bound is ignored if the mean itself lies beyond it, as
        may be with a difference of losses.
    """
    (least, most), mean = bounds or (None, None), self.mean
    low, high = mean - self.half_width, mean + self.half_width
    low = low if least is None or mean < least else max(low, least)
    high = high if most is None or mean > most else min(high, most)
    return low, high

  def text(self, spec: str, bounds: Bounds = None) -> str:
    """The interval as text, with numbers in the format `spec`.

    The text has the mean and the half width, or the mean and both ends where a
    bound cuts the interval.
    """
    ends = self.ends(bounds)
    if np.isinf(self.half_width) or ends == self.ends():
      return f'{self:{spec}}'
    return f'{self.mean:{spec}} ({ends[0]:{spec}} to {ends[1]:{spec}})'

  def sign(self) -> int:
    """Sign of the mean where the interval excludes 0, else 0."""
    return int(np.sign(self.mean)) if abs(self.mean) > self.half_width else 0

  def __format__(self, spec: str) -> str:
    """Mean and half width as text, such as '1.3580 ± 0.0040'."""
    width = f'{self.half_width:{spec.lstrip("+")}}'
    if np.isinf(self.half_width):
      width = 'unknown'
    return f'{self.mean:{spec}} ± {width}'
