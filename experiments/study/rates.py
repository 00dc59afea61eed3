"""The search of a learning rate for each arm, by runs that judge nothing.

An arm that is compared at a rate which suits another arm may lose for the rate
alone. So each arm is trained over a whole short schedule at every rate of a
grid, with seeds of its own, and goes on with the rate of the lowest mean loss.
A study is exempt for one of two reasons, which its page gives.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from experiments.study.parts import Arm, Column, Results

KEY = 'optimizer.learning_rate'
LEAST_RATES = 4
# None of them is a seed of reported runs, which are counted from 0.
SEEDS = (1000, 1001)
SHARE = 0.3  # of a run's steps that a trial has, unless a study says otherwise
# Reasons to search no rate.
OPTIMIZER, UNTRAINED = 'the optimizer is the question', 'nothing is trained'


def trial_name(arm: Arm, rate: float) -> str:
  """Name of the runs that try a rate for an arm."""
  return f'{arm.name}, trial at {rate:g}'


def trials(
  rates: Sequence[float],
  share: float,
  arms: Sequence[Arm],
  shared: ConfigDict,
) -> list[Arm]:
  """The trials of arms that train, at every rate; see `Study.trial_share`."""
  lengths: dict[str, int] = {'total_steps': shared.total_steps}
  if 'warmup_steps' in shared.optimizer.schedule:
    warmup_steps = shared.optimizer.schedule.warmup_steps
    lengths['optimizer.schedule.warmup_steps'] = warmup_steps
  made = []
  for arm in arms:
    own = {key: arm.overrides.get(key, n) for key, n in lengths.items()}
    shorter = {key: math.ceil(share * n) for key, n in own.items()}
    before = dict(start=arm.start, teacher=arm.teacher)
    for rate in rates if arm.change is None else ():
      overrides = {**arm.overrides, **shorter, KEY: rate}
      made.append(Arm(trial_name(arm, rate), overrides, **before))
  return made


def chosen(
  rates: Sequence[float], arms: Sequence[Arm], results: Results, column: Column
) -> dict[str, float]:
  """The rate of the lowest mean loss of each arm's trials, by the arm's name.

  Of equal ones the first is taken; a trial that diverged has no loss.
  """
  best = {}
  for arm in arms:
    names = [trial_name(arm, rate) for rate in rates]
    if names[0] in results:
      losses = [np.mean([*map(column.of, results[name])]) for name in names]
      finite = np.nan_to_num(losses, nan=np.inf)
      best[arm.name] = rates[int(np.argmin(finite))]
  return best


def described(best: Mapping[str, float], rates: Sequence[float]) -> str:
  """A sentence on the rates that arms were given, and whether one is an end."""
  listed = ', '.join(f'{name} {rate:g}' for name, rate in best.items())
  ends = [name for name, r in best.items() if r in (min(rates), max(rates))]
  warning = f' At an end of the grid: {", ".join(ends)}.' if ends else ''
  return (
    f'Learning rates, each searched on {", ".join(f"{r:g}" for r in rates)} by '
    f'{len(SEEDS)} seeds that judge nothing: {listed}.{warning}'
  )
