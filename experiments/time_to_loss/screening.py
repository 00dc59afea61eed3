"""Chooses the models that go on after short runs, and their learning rates.

The rules stand here before any result is seen. Not here: the runs
(`speed_arms.py`), and what is reported of them (`speed_rows.py`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from experiments.study.annealed import ratio_to
from experiments.study.parts import Arm, Column, Preset, Results
from experiments.study.study import Exploration
from experiments.time_to_loss.speed_arms import (
  SCREENED_RATE,
  TRIAL,
  SpeedModel,
  arm_name,
  groups,
  parsed,
  twin_of,
)

# The evaluation that gives every token room, whose loss is compared.
NO_DROPS = 'no_drops'
LOSS = Column('loss', f'eval/{NO_DROPS}/loss', 'nats/byte')
# A seed that no reported run has.
SEEDS = (100,)
# Lengths of the dense twin's trials, in lengths of a sparse model's.
_TWIN_LENGTHS = (1, 2)


class Prediction(NamedTuple):
  """What short runs foresee of a model, as ratios to the dense twin's.

  Attributes:
    steps: Steps of the trial over those in which the twin, annealed, has the
      same loss.
    time: Time of a step.
    seconds: The product of both.
  """

  steps: float
  time: float
  seconds: float


def screen(
  models: Sequence[SpeedModel], preset: Preset, most: int
) -> Exploration:
  """Short runs of all models and of their twins at one rate for each width.

  The width is that of the model with the smallest predicted seconds to the
  dense loss; its best models go on, with their twin.

  Args:
    models: The sparse models.
    preset: The preset.
    most: Largest number of sparse models that go on.
  """

  def arms(_: Sequence[Arm], shared: ml_collections.ConfigDict) -> list[Arm]:
    del shared
    return _trials(models, preset)

  def chosen(
    so_far: Sequence[Arm], results: Results, times: Mapping[str, float]
  ) -> list[Arm]:
    ranked = ranking(predictions(results, times))
    twin = twin_of(ranked[0])
    best = [model for model in ranked if twin_of(model) == twin][:most]
    return [arm for name in (twin, *best) for arm in so_far if arm.line == name]

  return Exploration(arms, chosen, SEEDS, groups)


def _trials(models: Sequence[SpeedModel], preset: Preset) -> list[Arm]:
  """The arms of a screening, those of dense twins with two lengths."""
  twins = dict.fromkeys(model.twin for model in models)
  return [
    *(
      twin.arm(preset, TRIAL * length, SCREENED_RATE[twin.width])
      for twin in twins
      for length in _TWIN_LENGTHS
    ),
    *(m.arm(preset, TRIAL, SCREENED_RATE[m.width]) for m in models),
  ]


def search_rates(preset: Preset, rates: Sequence[float]) -> Exploration:
  """Short runs of all arms' models, dense ones too, at the same rates.

  Each model goes on with the rate of the lowest loss.

  Args:
    preset: The preset.
    rates: The learning rates.
  """

  def arms(
    so_far: Sequence[Arm], shared: ml_collections.ConfigDict
  ) -> list[Arm]:
    del shared
    first = {arm.line: arm for arm in so_far}
    own = {'total_steps': round(TRIAL * preset.steps)}
    return [
      Arm(
        arm_name(model, TRIAL, rate),
        {**arm.overrides, **own, 'optimizer.learning_rate': rate},
        f'{model}, rate {rate:g}',
        TRIAL,
      )
      for model, arm in first.items()
      for rate in rates
    ]

  def chosen(
    so_far: Sequence[Arm], results: Results, times: Mapping[str, float]
  ) -> list[Arm]:
    del times
    best = best_rates(results, rates)
    key = 'optimizer.learning_rate'
    return [
      Arm(a.name, {**a.overrides, key: best[a.line]}, a.line, a.x)
      for a in so_far
    ]

  return Exploration(arms, chosen, SEEDS)


def best_rates(results: Results, rates: Sequence[float]) -> dict[str, float]:
  """The rate of the lowest loss of each model that was tried at all of them."""
  losses: dict[str, dict[float, float]] = {}
  for name, runs in results.items():
    model, length, rate = parsed(name)
    if rate in rates and length == TRIAL:
      losses.setdefault(model, {})[rate] = loss_of(runs)
  return {
    model: min(tried, key=tried.__getitem__)
    for model, tried in losses.items()
    if len(tried) == len(rates)
  }


def predictions(
  results: Results, times: Mapping[str, float]
) -> dict[str, Prediction]:
  """Predictions of the models that were screened, by name.

  A model that has its twin's loss after half of the steps takes half of them.
  The twin's loss is taken as linear in the logarithm of its length.
  """
  found = {}
  for name, time in times.items():
    model, length, rate = parsed(name)
    twin = twin_of(model)
    lengths = [length * factor for factor in _TWIN_LENGTHS]
    twins = [arm_name(twin, own, rate) for own in lengths]
    if not rate or model == twin or not results.keys() >= {name, *twins}:
      continue
    losses = [loss_of(results[own]) for own in twins]
    steps = length / ratio_to(loss_of(results[name]), lengths, losses)
    found[model] = Prediction(steps, float(time), steps * float(time))
  return found


def ranking(found: Mapping[str, Prediction]) -> list[str]:
  """Models by predicted seconds; those without a prediction are last."""
  return sorted(
    found, key=lambda m: np.nan_to_num(found[m].seconds, nan=np.inf)
  )


def loss_of(runs: Sequence[Mapping[str, float]]) -> float:
  """The mean loss of runs."""
  return float(np.mean([LOSS.of(run) for run in runs]))
