"""The models that `switch_speed` may compare, their arms, and their choice.

Short runs choose the models that go on, and their learning rates. The rules
were written before any result was seen.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from experiments.study import byte_models
from experiments.study.parts import Arm, Column, Preset, Results
from experiments.study.study import Exploration
from experiments.time_to_loss.annealed import ratio_to
from moe_jax.errors import InputError

# Keys of `model.moe` by the name of the room that experts have for tokens.
ROOMS: dict[str, dict[str, Any]] = {
  'dropless': {'capacity.kind': 'all', 'dispatch.kind': 'dropless'},
  'capacity 1': {'capacity.per_assignment.factor': 1.0},
  'capacity 1.25': {'capacity.per_assignment.factor': 1.25},
}
EXPERTS, LAYERS = (4, 8, 16, 32), ('all', 'every 2')
# The learning rate with which models of a width are screened.
SCREENED_RATE = {128: 4e-3, 256: 2e-3}
_NAME = re.compile(r'(.+?)(?:, rate ([\d.e-]+))?, ([\d.]+) of the steps')


@dataclasses.dataclass(frozen=True)
class SpeedModel:
  """A sparse model, or a dense one.

  Attributes:
    width: Width M; a dense feed-forward has 4 M hidden values, and so have the
      K experts of a token together.
    num_experts: Number of experts E; 0 for the dense model.
    num_selected: Number of experts K of a token.
    room: Name of the room that experts have for tokens, from `ROOMS`.
    layers: The layers that are sparse.
  """

  width: int
  num_experts: int = 0
  num_selected: int = 1
  room: str = 'dropless'
  layers: str = 'all'

  @property
  def name(self) -> str:
    """Name of the model in tables."""
    if not self.num_experts:
      return f'width {self.width}, dense'
    return f'{self.family}, top-{self.num_selected} of {self.num_experts}'

  @property
  def family(self) -> str:
    """Name of the models that differ in experts and choices alone."""
    where = {'all': 'all layers', 'every 2': 'every 2nd layer'}[self.layers]
    return f'width {self.width}, {where}, {self.room}'

  @property
  def twin(self) -> Self:
    """The dense model that multiplies as much."""
    return type(self)(self.width)

  def arm(self, preset: Preset, length: float, rate: float = 0.0) -> Arm:
    """The arm of this model.

    Args:
      preset: The preset, which has the steps of the dense twin.
      length: Length of the runs as a fraction of these.
      rate: Learning rate of a trial; 0 for a reported arm, which keeps the
        config's until one is chosen.
    """
    M, name = self.width, arm_name(self.name, length, rate)
    overrides: dict[str, Any] = {
      'model.width': M,
      'model.ffn.hidden': 4 * M,
      'total_steps': round(length * preset.steps),
    }
    line = self.name
    if rate:
      overrides['optimizer.learning_rate'] = rate
      line = f'{self.name}, rate {rate:g}'
    arm = byte_models.dense(name)
    if self.num_experts:
      moe = {
        'num_experts': self.num_experts,
        'layers': self.layers,
        **ROOMS[self.room],
      }
      arm = byte_models.top_k(name, self.num_selected, 4 * M, moe)
    return Arm(name, {**arm.overrides, **overrides}, line, length)


@dataclasses.dataclass(frozen=True)
class SpeedPreset(Preset):
  """A preset of this study; steps are those of the dense twin.

  Attributes:
    models: The sparse models, in the order of choice unless they are screened.
    most: Number of sparse models that a screening chooses; 0 for no screening,
      in which case all models are reported.
    width: Width of the models that a screening may choose. Others, whose runs
      would take too long, are screened only.
    rates: Learning rates that are searched for each model.
    trial: Length of the runs that choose models, and rates of sparse ones, as a
      fraction of the steps.
    lengths: Lengths of a sparse model's runs, as fractions of the steps,
      ascending to 1.
  """

  models: Sequence[SpeedModel] = ()
  most: int = 0
  width: int = 128
  rates: Sequence[float] = ()
  trial: float = 0.3
  lengths: Sequence[float] = (0.5, 0.7, 1.0)

  @property
  def twin(self) -> SpeedModel:
    """The dense twin of the models that a screening may choose."""
    return SpeedModel(self.width)


# All models that the question is about; no preset has all of them.
GRID = [
  SpeedModel(width, E, K, room, layers)
  for width, layers, room, K, E in itertools.product(
    SCREENED_RATE, LAYERS, ROOMS, (1, 2), EXPERTS
  )
]


def arm_name(model: str, length: float, rate: float = 0.0) -> str:
  """Name of an arm; see `SpeedModel.arm`."""
  rate_text = f', rate {rate:g}' if rate else ''
  return f'{model}{rate_text}, {length:g} of the steps'


def parsed(name: str) -> tuple[str, float, float]:
  """The model's name, the length and the rate, 0 if none, of an arm's name.

  Raises:
    ValueError: No arm has such a name.
  """
  match = _NAME.fullmatch(name)
  if match is None:
    raise InputError(f'{name!r} is not the name of an arm of this study')
  model, rate, length = match.groups()
  return model, float(length), float(rate or 0)


def reported(names: Sequence[str]) -> dict[str, list[float]]:
  """The lengths of reported arms, ascending, by model in the order of names.

  Args:
    names: Names of arms, those of trials among them.
  """
  lengths: dict[str, list[float]] = {}
  for name in names:
    model, length, rate = parsed(name)
    if not rate:
      lengths.setdefault(model, []).append(length)
  return {model: sorted(several) for model, several in lengths.items()}


def twin_of(model: str) -> str:
  """Name of the dense twin of a model, by its name."""
  return f'{model.partition(",")[0]}, dense'


def groups(arms: Sequence[Arm]) -> list[list[str]]:
  """Names of the longest arm of each model, by width; dense ones are first."""
  longest: dict[str, Arm] = {}
  for arm in arms:
    model, _, _ = parsed(arm.name)
    if model not in longest or longest[model].x < arm.x:
      longest[model] = arm
  by_twin: dict[str, list[str]] = {}
  for model, arm in longest.items():
    names = by_twin.setdefault(twin_of(model), [])
    names.insert(0 if model == twin_of(model) else len(names), arm.name)
  return list(by_twin.values())


def not_run(names: Mapping[str, Any]) -> Iterator[str]:
  """The models of the grid without any arm, a text for each family."""
  models_run = {parsed(name)[0] for name in names}
  missing: dict[str, list[str]] = {}
  for model in GRID:
    if model.name not in models_run:
      choices = f'{model.num_selected} of {model.num_experts}'
      missing.setdefault(model.family, []).append(choices)
  for family, models in missing.items():
    whole_family = len(models) == 2 * len(EXPERTS)
    yield family + ('' if whole_family else f': top-{", ".join(models)}')


# The evaluation that gives every token room, whose loss is compared.
NO_DROPS = 'no_drops'
LOSS = Column('loss', f'eval/{NO_DROPS}/loss', 'nats/byte')
# A seed that no reported run has.
SEEDS = (100,)
# Lengths of the dense twin's trials, in lengths of a sparse model's.
_TWIN_LENGTHS = (1, 2)


class Prediction(NamedTuple):
  """Seconds of a model to the dense loss, foreseen by short runs.

  Both numbers are ratios to those of the dense twin.

  Attributes:
    time: Time of a step.
    seconds: That time multiplied by the steps of the trial over those in which
      the twin, annealed, has the same loss.
  """

  time: float
  seconds: float


def screen(preset: SpeedPreset) -> Exploration:
  """Short runs of all models and of their twins at one rate for each width.

  The models of the preset's width with the smallest predicted seconds to the
  dense loss go on, with their twin.
  """

  models, twins = preset.models, dict.fromkeys(m.twin for m in preset.models)
  trials = [(twin, length) for twin in twins for length in _TWIN_LENGTHS]
  trials += [(model, 1) for model in models]

  def arms(*_: Any) -> list[Arm]:
    return [
      model.arm(preset, preset.trial * length, SCREENED_RATE[model.width])
      for model, length in trials
    ]

  def chosen(so_far, results, times) -> list[Arm]:
    ranked, twin = ranking(predictions(results, times)), preset.twin.name
    best = [m for m in ranked if twin_of(m) == twin][: preset.most]
    return [arm for name in (twin, *best) for arm in so_far if arm.line == name]

  return Exploration(arms, chosen, SEEDS, groups)


def search_rates(preset: SpeedPreset) -> Exploration:
  """Runs of all arms' models, dense ones too, at the preset's rates.

  Each model goes on with the rate of the lowest loss. A dense twin is run at
  its full length, so that its rate is the best for the loss that is the target,
  and a sparse model at that of a trial, so that the search favours the twin.
  """

  by_name = {m.name: m for model in preset.models for m in (model, model.twin)}

  def arms(so_far, _) -> list[Arm]:
    return [
      by_name[name].arm(preset, length, rate)
      for name, length in dict.fromkeys(
        (arm.line, 1.0 if arm.line == twin_of(arm.line) else preset.trial)
        for arm in so_far
      )
      for rate in preset.rates
    ]

  def chosen(so_far, results, _) -> list[Arm]:
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
    predicted[model] = Prediction(float(time), steps * float(time))
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
