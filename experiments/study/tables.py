"""Intervals over paired seeds, and tables in Markdown."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean over seeds with the half width of its 95 % confidence interval.

  The interval is Student's; of one seed it is infinite.
  """

  mean: float
  half_width: float

  @classmethod
  def of(cls, values: Sequence[float]) -> 'Interval':
    """The interval of one value a seed."""
    n = len(values)
    if n < 2:
      return cls(float(np.mean(values)), float('inf'))
    error = np.std(values, ddof=1) / np.sqrt(n)
    return cls(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * error))

  def sign(self) -> int:
    """-1 or 1 where the whole interval is on that side of 0, else 0."""
    if not abs(self.mean) > self.half_width:
      return 0
    return 1 if self.mean > 0 else -1

  def __format__(self, spec: str) -> str:
    """'1.3580 ± 0.0040', both in `spec`."""
    width = f'{self.half_width:{spec.lstrip("+")}}'
    if np.isinf(self.half_width):
      width = 'unknown'
    return f'{self.mean:{spec}} ± {width}'


def ratios(values: np.ndarray, base: np.ndarray) -> np.ndarray:
  """One ratio a seed; their mean is the mean of `values` over that of `base`.

  The ratios scatter as both do, to first order, so that the interval of their
  mean is that of the ratio of means.
  """
  ratio = values.mean() / base.mean()
  return ratio + (values - ratio * base) / base.mean()


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
  """The rows as a table in GitHub's Markdown; headings are the first's keys."""
  headings = list(rows[0])
  lines = [headings, ['---'] * len(headings)]
  lines += [[row[h] for h in headings] for row in rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'
