"""Arms, rows and remarks of the table of 1991's systems."""

from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from experiments.origins_1991.claims import COLUMNS, SHARED, SYSTEMS
from experiments.origins_1991.descent_runner import TARGETS, Descent
from experiments.study.parts import Arm, Preset, Result, Results, Row
from experiments.study.tables import ratios
from moe_jax import sections

# Seeds of the runs that choose learning rates; none of them is reported.
EXPLORED = range(1000, 1005)
RATE = 'learning rate'
# Results of one system by learning rate, ascending.
Sweep = Mapping[float, Sequence[Result]]


def arms(preset: Preset) -> list[Arm]:
  """An arm for each system; learning rates are chosen later."""
  del preset
  return [Arm(name, system, line=name) for name, system in SYSTEMS.items()]


def explored(
  arms: Sequence[Arm], shared: ml_collections.ConfigDict
) -> list[Arm]:
  """An arm for each system and learning rate, from which rates are chosen."""
  patience = {'patience': len(EXPLORED)}
  rates = TARGETS[sections.read(Descent, shared).targets].rates
  return [
    Arm(
      f'{arm.name}, rate {rate:g}',
      {**arm.overrides, **patience, 'learning_rate': rate},
      arm.name,
      rate,
    )
    for arm in arms
    for rate in rates
  ]


def sweeps(results: Results) -> dict[str, Sweep]:
  """Results of every system at every explored learning rate."""
  return {
    name: {
      runs[0][RATE]: runs
      for arm, runs in results.items()
      if arm.startswith(f'{name}, rate ')
    }
    for name in SYSTEMS
  }


def chosen(
  arms: Sequence[Arm], results: Results, times: Mapping[str, float]
) -> list[Arm]:
  """Arms of every system at its best rate, then at the rate best for all."""
  del times
  of_arms = sweeps(results)
  shared = best_rate(list(of_arms.values()))
  best = {arm.name: best_rate([of_arms[arm.name]]) for arm in arms}
  return [
    Arm(
      arm.name + suffix,
      {**arm.overrides, 'learning_rate': shared if suffix else best[arm.name]},
      arm.name,
    )
    for suffix in ('', SHARED)
    for arm in arms
  ]


def best_rate(sweeps: Sequence[Sweep]) -> float:
  """The learning rate at which most runs reach the criterion.

  Of several such rates it is that with the fewest mean epochs.

  Args:
    sweeps: Results by rate of each system; the rate is chosen for all of them.
  """

  def merit(rate: float) -> tuple[float, float]:
    reached = sum(sum(r['reached'] for r in sweep[rate]) for sweep in sweeps)
    epochs = sum(
      float(np.mean([r['epochs'] for r in sweep[rate]])) for sweep in sweeps
    )
    return -reached, epochs

  return min(sweeps[0], key=merit)


def rows(results: Results, times: Mapping[str, float]) -> list[Row]:
  """Rows of every system at its best rate, then at the shared one.

  A run that never reached the criterion counts with its number of epochs, which
  is less than it would have needed.
  """
  del times
  rows = []
  for suffix in ('', SHARED):
    base = _epochs(results['BP, 6 hidden' + suffix])
    for name in SYSTEMS:
      runs = results[name + suffix]
      epochs = _epochs(runs)
      deviation = epochs.std(ddof=min(1, len(epochs) - 1))
      values = {c.name: [c.of(run) for run in runs] for c in COLUMNS if c.key}
      values |= {
        'SD of epochs': [deviation] * len(epochs),
        'epochs over BP, 6 hidden': list(ratios(epochs, base)),
      }
      rows.append(Row(name + suffix, values))
  return rows


def _epochs(runs: Sequence[Result]) -> np.ndarray:
  return np.array([run['epochs'] for run in runs], float)


def remarks(results: Results) -> str:
  """Text below the table: runs that failed, and what the columns mean."""
  failures, last = [], 0
  for suffix in ('', SHARED):
    for name in SYSTEMS:
      runs = results[name + suffix]
      missed = [run['epochs'] for run in runs if not run['reached']]
      if missed:
        last = int(max(missed))
        failures.append(f'{name}{suffix}: {len(missed)} of {len(runs)}')
  failed = 'All runs reached the criterion.'
  if failures:
    failed = (
      f'Runs that did not reach the criterion in {last:,} epochs, and count as '
      f'if they did at the last: {"; ".join(failures)}.'
    )
  sweep = next(iter(sweeps(results).values()))
  rates = ', '.join(f'{rate:g}' for rate in sweep)
  count = len(next(iter(sweep.values())))
  text = (
    f'{failed} Rates were chosen among {rates} with {count} seeds that '
    'are not reported. "In use" is the likeliest expert of more than 1 % of '
    'training cases, "ever heard" one with a proportion above 1 % in any, '
    '"alone" what the likeliest expert of each gets right without the others. '
    'I(expert; case) is what the choice of an expert says about the case, the '
    'entropy of the mean proportions less the mean entropy of the gate: ln 2 = '
    '0.693 where two experts have half of the cases each and gates decide.'
  )
  if next(iter(results.values()))[0]['expert output'] == 'logistic':
    text += (
      ' With one logistic output all distances are below 1, so that equation '
      '1.3 is nearly half of equation 1.2.'
    )
  return text
