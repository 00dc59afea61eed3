"""The rows and remarks of `switch_speed`, and the floor of its step times."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from experiments.benchmarks import roofline
from experiments.study import byte_models
from experiments.study.parts import Column, Results, Row
from experiments.study.times import StepTime
from experiments.time_to_loss.annealed import reached_at
from experiments.time_to_loss.screening import (
  LOSS,
  Prediction,
  best_rates,
  predictions,
  ranking,
)
from experiments.time_to_loss.speed_arms import (
  arm_name,
  not_run,
  parsed,
  reported,
  twin_of,
)
from moe_jax.analysis import cost
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

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
  lengths = reported(list(results))
  dense = [model for model in lengths if model == twin_of(model)]
  sparse = [model for model in lengths if model != twin_of(model)]
  table = [Row(name, _dense(name, results, times)) for name in dense]
  table += [
    Row(name, _sparse(name, lengths[name], results, times)) for name in sparse
  ]
  foreseen = predictions(results, times)
  table = [_with_prediction(row, foreseen) for row in table]
  table += [Row(FIRST, table[len(dense)].values)] if sparse else []
  table += [
    Row(f'{name}, screened only', _screened(foreseen[name]))
    for name in ranking(foreseen)
    if name not in lengths
  ]
  return table


def _with_prediction(row: Row, foreseen: Mapping[str, Prediction]) -> Row:
  """The row with the seconds that short runs predicted, if they did."""
  if row.name not in foreseen:
    return row
  seconds = [foreseen[row.name].seconds] * len(row.values[LOSS.name])
  return Row(row.name, {**row.values, PREDICTED: seconds})


def _screened(prediction: Prediction) -> dict[str, list[float]]:
  """The values of a model that was only screened, with one seed.

  Each stands twice, as a number that is measured once has no interval.
  """
  values = {TIME: prediction.time, PREDICTED: prediction.seconds}
  return {name: [value] * 2 for name, value in values.items()}


def _by_run(column: Column, runs: Sequence[Mapping]) -> list[float]:
  return [column.of(run) for run in runs]


def _by_seed(values: Sequence[float], seeds: int) -> list[float]:
  """A value of a burst for each seed."""
  return [values[i % len(values)] for i in range(seeds)]


def _dense(name: str, results: Results, times: Mapping[str, StepTime]):
  arm = arm_name(name, 1.0)
  runs, time = results[arm], times[arm]
  return {
    LOSS.name: _by_run(LOSS, runs),
    MS: [1e3 * s for s in _by_seed(time.seconds, len(runs))],
    TIME: [1.0] * len(runs),
    FLOOR: [_floor(arm, arm, results, times)] * len(runs),
    RATE.name: _by_run(RATE, runs),
  }


def _floor(
  arm: str, twin: str, results: Results, times: Mapping[str, StepTime]
) -> float:
  """The least seconds of an arm's step over the measured ones of its twin."""
  least = floor_seconds(results[arm], times[arm].peaks)
  return least / float(np.median(times[twin].seconds))


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


def _sparse(
  name: str,
  lengths: Sequence[float],
  results: Results,
  times: Mapping[str, StepTime],
):
  twin, arm = arm_name(twin_of(name), 1.0), arm_name(name, 1.0)
  runs, time, seeds = results[arm], times[arm], len(results[arm])
  target, loss = _by_run(LOSS, results[twin]), _by_run(LOSS, runs)
  steps = _steps(name, lengths, results)
  ratios = _by_seed(time.ratios, seeds)
  floor = _floor(arm, twin, results, times)
  return {
    LOSS.name: loss,
    MINUS: [a - b for a, b in zip(loss, target, strict=True)],
    'loss, training capacity': _by_run(_LIMITED, runs),
    'dropped in training': _by_run(_DROPPED, runs),
    STEPS: steps,
    MS: [1e3 * s for s in _by_seed(time.seconds, seeds)],
    TIME: ratios,
    SECONDS: [a * b for a, b in zip(steps, ratios, strict=True)],
    FLOOR: [floor] * seeds,
    LEAST: [floor * ratio for ratio in steps],
    RATE.name: _by_run(RATE, runs),
  }


def remarks(results: Results) -> str:
  """The text below the table: how to read it, and which models were not run."""
  lengths = reported(list(results))
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
  if missing := list(not_run(results)):
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
  if not (best := best_rates(results, rates)):
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
