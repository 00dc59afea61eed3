"""Seconds to the dense twin's loss, at a size where products dominate.

    python -m experiments.switch_speed --preset=quick

Switch Transformers (https://arxiv.org/abs/2101.03961), section 3.1: 64 experts
reach in a seventh of the time the loss that T5-Base has at its end.

The models here are byte-level decoders of four layers and width 128, or 256
where they are screened only, with 4 to 32 experts in all layers or in every
second one, top-1 and top-2, dropless or with a capacity of 1 or 1.25 slots an
assignment. A batch has 4,096 tokens, or half as many in `quick`. The learning
rate is constant after a warm-up and falls to zero over the last fifth
of every run, so that each compared length is annealed, and the lengths of a
model share what comes before (`time_to_loss/annealed.py`): lengths of 0.5, 0.7
and 1 cost 1.24 runs instead of 2.2. A cosine would have to be trained anew for
each length. The length at which a model would have its twin's final loss is
interpolated for each seed (loss over the logarithm of steps). Nothing is
extrapolated: a seed that is beyond the shortest or the longest length counts as
that length, and the text below the table says how many do.

The preset `long` first runs trials of 0.4 of the steps, with a seed of their
own: of 14 sparse models at one rate for each width, from which
`time_to_loss/speed_models.py` predicts seconds to the dense loss by measured
step times, and chooses two of width 128; then trials of these two at three
learning rates, at which their twin is run to its full length: the errors of a
short search are to the disadvantage of sparse models. The chosen models are run
with five seeds, and the models that were not run are listed. Models of width
256 are screened only: with five seeds two of them would take six hours more.
The screening favours models whose gain comes early. `full` and `quick` run
given models of width 128, one and two, after a search of their rates. For
`full` the same search was also run for 8 experts in all layers with a capacity
of 1.25: its best loss was 1.649 nats a byte against 1.633, and it was left out
before any of its seeds was run, to keep the preset short; its runs took 236
core minutes, beside other work. Evaluations come at the end of a run and are
not timed.

`quick` resolves no gain in time: after 300 steps sparse models have hardly
begun to gain, and two seeds leave intervals wider than any gain.
"""

from collections.abc import Iterator, Mapping, Sequence

import jax
import ml_collections
import numpy as np

from experiments.benchmarks import roofline
from experiments.study import byte_models, command
from experiments.study.jobs import layered
from experiments.study.parts import Arm, Claim, Column, Figure, Results, Row
from experiments.study.study import Exploration, Study
from experiments.study.times import StepTime
from experiments.switch_scaling import OTHER_TIME
from experiments.time_to_loss import speed_models
from experiments.time_to_loss.annealed import AnnealedRunner, reached_at
from experiments.time_to_loss.speed_models import (
  LOSS,
  SpeedModel,
  SpeedPreset,
  arm_name,
  parsed,
  twin_of,
)
from moe_jax.analysis import cost
from moe_jax.run_config import RunConfig
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Largest warm-up, in steps and as a fraction of the steps of the dense twin: at
# most half of the shortest run, so that it is the same for all lengths.
_WARMUP, _WARMUP_SHARE = 100, 0.15
_SCREENED = [
  *(SpeedModel(128, E, 1, 'capacity 1') for E in (8, 16)),
  *(SpeedModel(128, E, 1, 'capacity 1.25') for E in (8, 16, 32)),
  *(SpeedModel(128, E, 1, 'dropless') for E in (4, 8, 16)),
  SpeedModel(128, 16, 1, 'capacity 1.25', 'every 2'),
  SpeedModel(128, 16, 1, 'dropless', 'every 2'),
  SpeedModel(128, 16, 2, 'capacity 1'),
  SpeedModel(256, 8, 1, 'capacity 1.25'),
  SpeedModel(256, 8, 1, 'dropless'),
  SpeedModel(256, 16, 1, 'capacity 1.25', 'every 2'),
]
# Name of the row that claims are about: the first of the chosen models.
FIRST = 'the first choice'
MINUS = 'minus dense, at equal steps'
STEPS, SECONDS = 'steps to dense loss', 'seconds to dense loss'
TIME, MS = 'step time / dense', 'step time'
FLOOR, LEAST = 'floor of step time / dense', 'floor of seconds'
PREDICTED = 'predicted seconds'
RATE = Column('rate', 'learning_rate', digits=4)
_LIMITED = Column('loss', f'eval/{byte_models.EVAL}/loss')
_DROPPED = Column('dropped', 'train/drop_rate', each=lambda rate: 100 * rate)
_FLOPS, _BYTES = 'step/flops', 'step/optimizer_bytes'
_EXPERT_FLOPS = 'step/expert_flops'

COLUMNS = [
  LOSS,
  Column(MINUS, unit='nats/byte'),
  Column('loss, training capacity', unit='nats/byte'),
  Column('dropped in training', unit='%', digits=1),
  Column(STEPS, digits=2),
  Column(MS, unit='ms', digits=0),
  Column(TIME, digits=2),
  Column(SECONDS, digits=2),
  Column(FLOOR, digits=2),
  Column(LEAST, digits=2),
  Column(PREDICTED, digits=2),
  RATE,
]


def config(steps: int) -> ml_collections.ConfigDict:
  """The config that the arms share."""
  config = byte_models.decoder(steps, width=128, hidden=512, num_layers=4)
  config.batch_size, config.data.seq_len = 32, 128
  config.optimizer.schedule.warmup_steps = min(
    _WARMUP, int(_WARMUP_SHARE * steps)
  )
  config.optimizer.learning_rate = speed_models.SCREENED_RATE[128]
  config.evals[speed_models.NO_DROPS] = byte_models.no_drops()
  trapezoid = {'optimizer.schedule.kind': 'trapezoid'}
  return layered(RunConfig, config, trapezoid)


def arms(preset: SpeedPreset) -> list[Arm]:
  """An arm of each dense twin, and one of each sparse model and length."""
  twins = dict.fromkeys(model.twin for model in preset.models)
  return [
    *(twin.arm(preset, 1.0) for twin in twins),
    *(m.arm(preset, x) for m in preset.models for x in preset.lengths),
  ]


def explorations(preset: SpeedPreset) -> list[Exploration]:
  """The screening of models, if the preset has one, and the search of rates."""
  stages = []
  if preset.most:
    stages.append(speed_models.screen(preset))
  if preset.rates:
    stages.append(speed_models.search_rates(preset))
  return stages


def measured(run: Run, state: TrainState) -> dict[str, float]:
  """A run's learning rate, and the work of its step that sets a floor."""
  options = run.options
  rows, length = options.batch_size, options.data.seq_len
  # A causal token attends to half of the others, on average.
  counted = cost.count(run.model, length, batch_size=rows).decoder
  other_flops = counted.total - counted.experts - counted.attention // 2
  params, moments = (
    sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    for tree in (state.params, state.opt_state)
  )
  return {
    RATE.key: options.optimizer.learning_rate,
    _FLOPS: 3.0 * rows * length * other_flops,
    _EXPERT_FLOPS: 3.0 * rows * length * counted.experts,
    # Parameters and moments are read and written, and gradients are read.
    _BYTES: float(2 * (params + moments) + params),
  }


def floor_seconds(runs: Sequence[Mapping], peaks: roofline.Peaks) -> float:
  """The least seconds of a step: its products, then one pass of the optimizer.

  Products run at the speed of a large matmul and the optimizer at that of a
  copy. Masked halves of attention, empty slots and tokens that a full expert
  drops are not multiplied.
  """
  # A dense model has no rate of dropped tokens.
  served = 1 - float(np.nan_to_num(max(_by_run(_DROPPED, runs)))) / 100
  run = runs[0]
  flops = run[_FLOPS] + served * run[_EXPERT_FLOPS]
  return flops / peaks.flops_per_second + run[_BYTES] / peaks.bytes_per_second


def rows(results: Results, times: Mapping[str, StepTime]) -> list[Row]:
  """The dense twins, the chosen models, the first of them again, the others.

  The seconds of a seed are its ratio of steps times the ratio of step times in
  one of the bursts, a burst for each seed, so that their interval holds both
  sources of error.
  """
  lengths = speed_models.reported(list(results))
  dense = [model for model in lengths if model == twin_of(model)]
  sparse = [model for model in lengths if model != twin_of(model)]
  foreseen = speed_models.predictions(results, times)
  table = []
  for name in (*dense, *sparse):
    values = _values(name, lengths[name], results, times)
    if name in foreseen:
      seconds = foreseen[name].seconds
      values[PREDICTED] = [seconds] * len(values[LOSS.name])
    table.append(Row(name, values))
  if sparse:
    table.append(Row(FIRST, table[len(dense)].values))
  for name in speed_models.ranking(foreseen):
    if name not in lengths:
      # Each number stands twice, as one that is measured once has no interval.
      time, seconds = ([value] * 2 for value in foreseen[name])
      values = {TIME: time, PREDICTED: seconds}
      table.append(Row(f'{name}, screened only', values))
  return table


def _by_run(column: Column, runs: Sequence[Mapping]) -> list[float]:
  return [column.of(run) for run in runs]


def _by_seed(values: Sequence[float], seeds: int) -> list[float]:
  """A value of a burst for each seed."""
  return [values[i % len(values)] for i in range(seeds)]


def _values(
  name: str,
  lengths: Sequence[float],
  results: Results,
  times: Mapping[str, StepTime],
) -> dict[str, list[float]]:
  """The values of each seed of a reported model, by name of the column."""
  twin, arm = arm_name(twin_of(name), 1.0), arm_name(name, 1.0)
  runs, time, seeds = results[arm], times[arm], len(results[arm])
  ratios, loss = _by_seed(time.ratios, seeds), _by_run(LOSS, runs)
  floor = floor_seconds(runs, time.peaks)
  floor /= float(np.median(times[twin].seconds))
  values = {
    LOSS.name: loss,
    MS: [1e3 * s for s in _by_seed(time.seconds, seeds)],
    TIME: ratios,
    FLOOR: [floor] * seeds,
    RATE.name: _by_run(RATE, runs),
  }
  if arm == twin:
    return values
  target, steps = _by_run(LOSS, results[twin]), _steps(name, lengths, results)
  return values | {
    MINUS: [a - b for a, b in zip(loss, target, strict=True)],
    'loss, training capacity': _by_run(_LIMITED, runs),
    'dropped in training': _by_run(_DROPPED, runs),
    STEPS: steps,
    SECONDS: [a * b for a, b in zip(steps, ratios, strict=True)],
    LEAST: [floor * ratio for ratio in steps],
  }


def _steps(
  model: str, lengths: Sequence[float], results: Results
) -> list[float]:
  """Steps of each seed to its dense twin's final loss, over the twin's."""
  target = _by_run(LOSS, results[arm_name(twin_of(model), 1.0)])
  losses = [_by_run(LOSS, results[arm_name(model, x)]) for x in lengths]
  return [
    reached_at(goal, lengths, seed_losses)
    for goal, *seed_losses in zip(target, *losses, strict=True)
  ]


def remarks(results: Results) -> str:
  """The text below the table: how to read it, and which models were not run."""
  lengths = speed_models.reported(list(results))
  first = next((m for m in lengths if m != twin_of(m)), 'none')
  rates = sorted({rate for name in results if (rate := parsed(name)[2])})
  paragraphs = [
    'Losses are those of an evaluation that drops no token; those with the '
    'capacity of training stand beside them. The seconds of each seed are its '
    'ratio of steps times the ratio of step times in a burst of its own, so '
    'that their interval holds both sources of error. The floor of a step is '
    'its products at the speed of a large matmul and one pass of the optimizer '
    'over parameters and moments at that of a copy, over the measured step of '
    'the dense twin; masked attention, empty slots and dropped tokens cost '
    'nothing there. Steps are timed from the first one on, before routers have '
    'learned to prefer experts: the time of a dropless step on uneven choices '
    'later in training may be longer.',
    f'{FIRST[0].upper()}{FIRST[1:]} is {first}.',
    *_ends(results, lengths),
    *_searched(results, rates),
  ]
  if missing := list(speed_models.not_run(results)):
    paragraphs.append(f'Not run: {"; ".join(missing)}.')
  return ' '.join(paragraphs)


def _ends(
  results: Results, lengths: Mapping[str, Sequence[float]]
) -> Iterator[str]:
  """Sentences on the seeds that reach the loss at an end of the lengths."""
  for model, model_lengths in lengths.items():
    if model == twin_of(model):
      continue
    steps = _steps(model, model_lengths, results)
    early, never = (
      int(np.isclose(steps, end).sum())
      for end in (model_lengths[0], model_lengths[-1])
    )
    if early:
      yield (
        f'{early} of {len(steps)} seeds of {model} have the dense loss at the '
        f'shortest length already and count as {model_lengths[0]:g}, more than '
        'the truth.'
      )
    if never:
      yield (
        f'{never} of {len(steps)} seeds of {model} have not reached the dense '
        f'loss at the longest length and count as {model_lengths[-1]:g}, so '
        "that the model's mean steps and seconds are lower bounds."
      )


def _searched(results: Results, rates: Sequence[float]):
  if not (best := speed_models.best_rates(results, rates)):
    yield 'Learning rates were not searched: all models of a width have one.'
    return
  ends = [
    model for model, rate in best.items() if rate in (rates[0], rates[-1])
  ]
  searched = ', '.join(f'{rate:g}' for rate in rates)
  yield (
    'Learning rates of the models that were run on all seeds were searched '
    f'among {searched}, on a seed of its own, for the dense ones at their full '
    'length and for sparse ones in shorter trials, which favours the dense '
    'ones; models that were screened only have one rate for each width.'
  )
  if ends:
    yield f'The best is at an end of these for {"; ".join(ends)}.'


SPEEDUP = 'switch2021/scaling/64E'
INVERSE = 'Their ratio is the inverse of the published speed-up, of 64 experts.'
GIVEN = {
  'quick': [SpeedModel(128, E, 1, 'capacity 1') for E in (8, 16)],
  'full': [SpeedModel(128, 16, 1, 'dropless', 'every 2')],
}
STUDY = Study(
  name='switch_speed',
  title='Seconds to the dense loss, where products dominate',
  source='Switch Transformers, section 3.1',
  config=config,
  arms=arms,
  presets={
    'quick': SpeedPreset(
      300,
      2,
      {'batch_size': 16},
      burst_for_each_seed=True,
      underpowered='after 300 steps sparse models have hardly begun to gain',
      models=GIVEN['quick'],
      rates=(2e-3, 4e-3),
      lengths=(0.5, 1.0),
    ),
    'full': SpeedPreset(
      800,
      3,
      burst_for_each_seed=True,
      models=GIVEN['full'],
      rates=(2e-3, 4e-3, 8e-3),
    ),
    'long': SpeedPreset(
      1600,
      5,
      burst_for_each_seed=True,
      models=_SCREENED,
      most=2,
      rates=(2e-3, 4e-3, 8e-3),
      trial=0.4,
    ),
  },
  columns=COLUMNS,
  claims=[
    Claim(
      'a sparse model reaches the dense loss in less time',
      f'{SECONDS}: {FIRST} < 1',
      note=OTHER_TIME,
      changes=['Until 2026-11-28 it was held against that speed-up.'],
    ),
    Claim(
      'in three quarters of the time',
      f'{SECONDS}: {FIRST} < 0.75',
      note='An aim of ours: a quarter is what would be worth a choice.',
    ),
    Claim(
      'in fewer steps',
      f'{STEPS}: {FIRST} < 1',
      [f'{SPEEDUP}/step_speedup'],
      INVERSE,
    ),
    Claim('at equal steps its loss is lower', f'{MINUS}: {FIRST} < 0'),
    Claim('its step costs more', f'{TIME}: {FIRST} > 1'),
  ],
  figure=Figure(
    [STEPS, TIME, SECONDS], without=('*, dense', FIRST, '*screened only')
  ),
  rows=rows,
  runner=AnnealedRunner(measured),
  explorations=explorations,
  timed=speed_models.groups,
  written='2026-11-28',
  remarks=remarks,
)
get_config, get_items = STUDY.get_config, STUDY.get_items

if __name__ == '__main__':
  command.main(STUDY)
