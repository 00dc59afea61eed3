"""Batch size times learning rate in fine-tuning, sparse and dense.

    python -m experiments.stmoe_batch_rate --preset=quick

ST-MoE (https://arxiv.org/abs/2202.08906), Figure 6 and Table 20: fine-tuned
sparse models gain from small batches and high rates, where their dense twins
prefer low rates; at the largest batch a sparse model scores 86.9 with a rate of
1e-3 and 84.3 with 1e-4. Resetting the slots that the optimizer has from
pre-training is said to hurt.

Here: the pre-trained decoders of `stmoe_freezing`. All runs see equally many
rows, so that a batch of 4 takes 16 times the steps of one of 64. A row called
"mean over" averages the runs of a seed over the other of the two settings.

Found: the lowest mean losses of both models are with the smallest batch and the
highest rate, though for the dense one no difference between batches of 4 and 16
is resolved. Claims on sparse against dense are withheld.
"""

import fnmatch
import itertools

import numpy as np

from experiments.study import command, finetuned, parts, rates
from experiments.study.parts import Arm, Claim, Figure, Preset, Row
from experiments.study.study import Study

BATCHES, RATES = (4, 16, 64), (3e-4, 1e-3, 3e-3)
MODELS = finetuned.MODELS
KEPT = 'sparse, slots of the optimizer kept'
LOSS = finetuned.LOSS.name
# Ends of the names of rows that are means over one of the two settings.
OVER_RATES, OVER_BATCHES = ', mean over rates', ', mean over batches'
# Names of the rows of differences between two settings.
SMALL, HIGH = 'gain of a small batch', 'gain of a high rate'
MORE = ': sparse minus dense'


def cell(model: str, batch: int, rate: float) -> str:
  """The name of an arm."""
  return f'{model}, batch {batch}, rate {rate:g}'


def arms(preset: Preset) -> list[Arm]:
  """An arm for each model, batch size and rate, all on equally many rows."""
  all_arms = []
  for model, batch, rate in itertools.product(MODELS, BATCHES, RATES):
    steps = preset.steps * 16 // batch
    start, changes = MODELS[model]
    overrides = {**changes, **finetuned.length(steps, max(steps // 10, 1))}
    overrides |= {'batch_size': batch, 'optimizer.learning_rate': rate}
    name, line = cell(model, batch, rate), f'{model}, batch {batch}'
    all_arms.append(Arm(name, overrides, line, rate, start))
  changes = {'init_from.keep_optimizer': True, 'optimizer.learning_rate': 1e-3}
  return [*all_arms, Arm(KEPT, changes, start=finetuned.SPARSE)]


def rows(results: parts.Results) -> list[Row]:
  """The cells that were run, their means, and what sparse gains over dense."""
  by_name = {
    arm.name: STUDY.row_of(arm, results)
    for arm in arms(Preset(1, 1))
    if arm.name in results
  }

  def add_mean(name: str, pattern: str) -> None:
    """Adds the mean of the cells that were run of those of a pattern."""
    cells = fnmatch.filter(by_name, pattern)
    if cells:  # a quick preset leaves some settings out
      losses = [by_name[other].values[LOSS] for other in cells]
      by_name[name] = Row(name, {LOSS: [*np.mean(losses, axis=0)]})

  def add_difference(name: str, one: str, other: str) -> None:
    by_name[name] = finetuned.minus(name, by_name[one], by_name[other])

  for m in MODELS:
    for x in BATCHES:
      add_mean(f'{m}, batch {x}{OVER_RATES}', f'{m}, batch {x}, rate *')
    for x in RATES:
      add_mean(f'{m}, rate {x:g}{OVER_BATCHES}', f'{m}, batch *, rate {x:g}')
  for name, before, after in (
    (SMALL, *(f'batch {BATCHES[i]}{OVER_RATES}' for i in (-1, 0))),
    (HIGH, *(f'rate {RATES[i]:g}{OVER_BATCHES}' for i in (0, -1))),
  ):
    for model in MODELS:
      pair = f'{model}, {before}', f'{model}, {after}'
      add_difference(f'{name}, {model}', *pair)
    add_difference(name + MORE, *(f'{name}, {model}' for model in MODELS))
  return list(by_name.values())


def best_cells(results: parts.Results) -> str:
  """A sentence on each model's best cell, by the mean over seeds."""
  sentences = []
  for model in MODELS:
    means = {
      name: np.mean([finetuned.LOSS.of(run) for run in results[name]])
      for name in fnmatch.filter(results, f'{model}, batch *, rate *')
    }
    best = min(means, key=means.__getitem__)
    sentences.append(
      f'The best cell of the {model} model is "{best}", with '
      f'{means[best]:.4f} nats a token.'
    )
  return ' '.join(sentences)


STUDY = Study(
  name='stmoe_batch_rate',
  title='Batch size times learning rate in fine-tuning',
  source='ST-MoE, Figure 6 and Table 20 (scores: higher is better there)',
  config=finetuned.config,
  arms=arms,
  rows=rows,
  starts=finetuned.pretrained,
  presets={
    'quick': Preset(
      100, 3, start_steps=300, without=('*, batch 16, *', '*, rate 0.001', KEPT)
    ),
    'full': Preset(300, 5, start_steps=600),
  },
  columns=[finetuned.LOSS],
  claims={
    'at the largest batch a sparse model wants the high rate': Claim(
      f'loss: {cell("sparse", 64, 3e-3)} < {cell("sparse", 64, 3e-4)}',
      ['stmoe2022/table20/lr 1e-3/score', 'stmoe2022/table20/lr 1e-4/score'],
      note='The rates here are 3e-3 and 3e-4.',
    ),
    'a sparse model gains from a small batch': f'loss: {SMALL}, sparse > 0',
    'a sparse model gains from a high rate': f'loss: {HIGH}, sparse > 0',
    'it gains more from a small batch than its dense twin': Claim(
      f'loss: {SMALL}{MORE} > 0', withheld=finetuned.OTHER_ORDER
    ),
    'it gains more from a high rate than its dense twin': Claim(
      f'loss: {HIGH}{MORE} > 0', withheld=finetuned.OTHER_ORDER
    ),
    'the dense twin prefers the lowest rate to the highest': (
      f'loss: {HIGH}, dense < 0'
    ),
    'resetting the slots of the optimizer hurts': (
      f'loss: {cell("sparse", 16, 1e-3)} > {KEPT}'
    ),
  },
  remarks=best_cells,
  written='2026-11-27',
  exempt=rates.OPTIMIZER,
  figure=Figure(
    ['loss'],
    'learning rate',
    log_x=True,
    without=['*, mean over *', 'gain of *'],
  ),
  tasks=finetuned.tasks('generated tasks with instructions'),
)
get_config, get_items = command.entries(STUDY, __name__)
