"""From the runs of 1991's systems to the rows and remarks of a table.

Not here: how they are run (`experiments/jacobs_table1.py`), or the columns
(`jacobs_claims.py`).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.origins_1991.jacobs_claims import SHARED
from experiments.origins_1991.jacobs_problems import Problem
from experiments.origins_1991.jacobs_runs import Runs
from experiments.study.study import Row
from experiments.study.tables import ratios


@dataclasses.dataclass(frozen=True)
class Found:
  """What became of a system.

  Attributes:
    sweep: By rate, over the seeds of the exploration.
    rates: Its best, and the one that all share.
    runs: At these two, over the seeds that are reported.
    measures: Of the runs at each rate.
  """

  sweep: Runs
  rates: tuple[float, float]
  runs: Runs
  measures: Sequence[Mapping[str, np.ndarray]]


def rows(found: Mapping[str, Found]) -> list[Row]:
  """Every system at its best rate, then at the shared one.

  A run that never reached the criterion counts with the epochs it made, which
  is the least that it can have needed.
  """
  made = []
  for i, suffix in enumerate(('', SHARED)):
    base = found['BP, 6 hidden'].runs.epochs[i].astype(float)
    for name, of in found.items():
      epochs = of.runs.epochs[i].astype(float)
      same = np.ones(len(epochs))
      values = {
        'learning rate': of.rates[i] * same,
        'epochs': epochs,
        'SD of epochs': epochs.std(ddof=min(1, len(epochs) - 1)) * same,
        'epochs over BP, 6 hidden': ratios(epochs, base),
        'reached': 100.0 * of.runs.reached[i],
        **of.measures[i],
      }
      made.append(Row(name + suffix, {k: list(v) for k, v in values.items()}))
  return made


def remarks(task: Problem, found: Mapping[str, Found], most: int) -> str:
  """What a reader of the table has to know of runs that did not get there."""
  never = []
  for i, suffix in enumerate(('', SHARED)):
    for name, of in found.items():
      if missed := int((~of.runs.reached[i]).sum()):
        never.append(f'{name}{suffix}: {missed} of {of.runs.reached.shape[1]}')
  failed = 'All runs reached the criterion.'
  if never:
    failed = (
      f'Runs that did not reach the criterion in {most:,} epochs, and count as '
      f'if they did at the last: {"; ".join(never)}.'
    )
  rates = ', '.join(f'{rate:g}' for rate in task.rates)
  explored = len(next(iter(found.values())).sweep.reached[0])
  said = (
    f'{failed} Rates were chosen among {rates} with {explored} seeds that '
    'are not reported. "In use" is the likeliest expert of more than 1 % of '
    'training cases, "ever heard" one with a proportion above 1 % in any, '
    '"alone" what the likeliest expert of each gets right without the others. '
    'I(expert; case) is what the choice of an expert says about the case, the '
    'entropy of the mean proportions less the mean entropy of the gate: ln 2 = '
    '0.693 where two experts have half of the cases each and gates decide.'
  )
  if task.expert_output == 'logistic':
    said += (
      ' With one logistic output all distances are below 1, so that equation '
      '1.3 is nearly half of equation 1.2.'
    )
  return said
