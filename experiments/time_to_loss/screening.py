"""Chooses the models that go on after short runs, and their learning rates.

The rules were written before any result was seen.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from experiments.study.parts import Arm, Column, Results
from experiments.study.study import Exploration
from experiments.time_to_loss.annealed import ratio_to
from experiments.time_to_loss.speed_arms import (
  SCREENED_RATE,
  SpeedPreset,
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
  """Steps and seconds of a model to the dense loss, foreseen by short runs.

  All are ratios to those of the dense twin.

  Attributes:
    steps: Steps of the trial over those in which the twin, annealed, has the
      same loss.
    time: Time of a step.
    seconds: The product of both.
  """

  steps: float
  time: float
  seconds: float


def screen(preset: SpeedPreset) -> Exploration:
  """Short runs of all models and of their twins at one rate for each width.

  The models of the preset's width with the smallest predicted seconds to the
  dense loss go on, with their twin.
  """

  def arms(_: Sequence[Arm], shared: ml_collections.ConfigDict) -> list[Arm]:
    del shared
    return _trials(preset)

  def chosen(
    so_far: Sequence[Arm], results: Results, times: Mapping[str, float]
  ) -> list[Arm]:
    ranked, twin = ranking(predictions(results, times)), preset.twin.name
    best = [m for m in ranked if twin_of(m) == twin][: preset.most]
    return [arm for name in (twin, *best) for arm in so_far if arm.line == name]

  return Exploration(arms, chosen, SEEDS, groups)


def _trials(preset: SpeedPreset) -> list[Arm]:
  """The arms of a screening, those of dense twins with two lengths."""
  models, trial = preset.models, preset.trial
  twins = dict.fromkeys(model.twin for model in models)
  return [
    *(
      twin.arm(preset, trial * length, SCREENED_RATE[twin.width])
      for twin in twins
      for length in _TWIN_LENGTHS
    ),
    *(m.arm(preset, trial, SCREENED_RATE[m.width]) for m in models),
  ]


def search_rates(preset: SpeedPreset) -> Exploration:
  """Runs of all arms' models, dense ones too, at the preset's rates.

  Each model goes on with the rate of the lowest loss. A dense twin is run at
  its full length, so that its rate is the best for the loss that is the target,
  and a sparse model at that of a trial, so that the search favours the twin.
  """

  def arms(
    so_far: Sequence[Arm], shared: ml_collections.ConfigDict
  ) -> list[Arm]:
    del shared
    lengths = {
      arm.line: 1.0 if arm.line == twin_of(arm.line) else preset.trial
      for arm in so_far
    }
    by_name = {model.name: model for model in preset.models}
    by_name |= {model.twin.name: model.twin for model in preset.models}
    return [
      by_name[name].arm(preset, length, rate)
      for name, length in lengths.items()
      for rate in preset.rates
    ]

  def chosen(
    so_far: Sequence[Arm], results: Results, times: Mapping[str, float]
  ) -> list[Arm]:
    del times
    best = best_rates(results, preset.rates)
    key = 'optimizer.learning_rate'
    return [
      Arm(a.name, {**a.overrides, key: best[a.line]}, a.line, a.x)
      for a in so_far
    ]

  return Exploration(arms, chosen, SEEDS)


def best_rates(results: Results, rates: Sequence[float]) -> dict[str, float]:
  """The rate of the lowest loss of each model that was tried at all of them."""
  losses: dict[tuple[str, float], dict[float, float]] = {}
  for name, runs in results.items():
    model, length, rate = parsed(name)
    if rate in rates:
      losses.setdefault((model, length), {})[rate] = loss_of(runs)
  return {
    # A run that diverged has no loss.
    model: min(
      loss_by_rate,
      key=lambda rate: np.nan_to_num(loss_by_rate[rate], nan=np.inf),
    )
    for (model, _), loss_by_rate in losses.items()
    if len(loss_by_rate) == len(rates)
  }


def predictions(
  results: Results, times: Mapping[str, float]
) -> dict[str, Prediction]:
  """Predictions of the models that were screened, by name.

  A model that has its twin's loss after half of the steps takes half of them.
  The twin's loss is taken as linear in the logarithm of its length.
  """
  predicted = {}
  for name, time in times.items():
    model, length, rate = parsed(name)
    twin = twin_of(model)
    lengths = [length * factor for factor in _TWIN_LENGTHS]
    twins = [arm_name(twin, x, rate) for x in lengths]
    if not rate or model == twin or not results.keys() >= {name, *twins}:
      continue
    losses = [loss_of(results[arm]) for arm in twins]
    steps = length / ratio_to(loss_of(results[name]), lengths, losses)
    predicted[model] = Prediction(steps, float(time), steps * float(time))
  return predicted


def ranking(predicted: Mapping[str, Prediction]) -> list[str]:
  """Models by predicted seconds; those without a prediction are last."""
  return sorted(
    predicted,
    key=lambda model: np.nan_to_num(predicted[model].seconds, nan=np.inf),
  )


def loss_of(runs: Sequence[Mapping[str, float]]) -> float:
  """The mean loss of runs."""
  return float(np.mean([LOSS.of(run) for run in runs]))
