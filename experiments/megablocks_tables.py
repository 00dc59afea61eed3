"""Padding and drops of real routings, and dropless experts against dropping.

    python -m experiments.megablocks_tables --preset=quick

MegaBlocks (https://arxiv.org/abs/2211.15841) drops no token: it sorts choices
by expert and fills each expert's rows up to whole blocks of a kernel, 128 rows.
Systems with slots drop what has none, or give all experts those of the fullest
one (Tutel's dynamic capacity). With 64 experts, top-1, it trains 1.38 to 4.35
times as fast as the latter, and reaches the loss of the best dropping model
1.18 to 1.38 times as fast: speeds of systems of GPUs, so that only directions
are tested.

Here: byte-level decoders of two sparse layers, top-1 of 8 or 32 experts; a
group is a batch of 2,048 tokens. As in the paper's scripts the balance loss has
a weight of 0.1 and is averaged over layers. Loads of the dropless models on
validation batches give the rows that would be multiplied for each choice in
blocks of 8, 32 and 128, with the slots of the fullest expert, and with 1, 1.5
or 2 slots a choice, and what these would drop. A block of 128 is half of the
mean load of 8 experts, and twice that of 32.

Models of 32 experts are also trained with such slots. At equal time the model
with one slot a choice has more steps than the dropless one, or fewer: its loss
at the ratio of step times is interpolated between runs of 0.7, 1 and 1.4 times
the steps, each annealed; a ratio beyond them counts as the nearest. Each seed
has the ratio of a burst of its own. A CPU's kernels have no blocks, and no
array can have the fullest expert's load as its shape: neither is timed.

The full preset, 7 arms of about 400 steps and 5 seeds, was planned for 14
minutes and 6 of timing on two idle cores; its runs took 33 core minutes. The
quick preset resolves loads, not losses. The claims were written before any run.
"""

from collections.abc import Mapping

import numpy as np

from experiments.study import byte_models, command, parts, routing, tables
from experiments.study.byte_models import top_k
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from experiments.study.times import StepTime
from moe_jax.shapes import Int
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

BLOCKS, FACTORS = (8, 32, 128), (1, 1.5, 2)
# Ways of serving a routing, by the part of the metrics' names for each.
WAYS = {
  **{f'blocks_{block}': f'blocks of {block}' for block in BLOCKS},
  'fullest': 'slots of the fullest',
  **{f'slots_{factor}': f'{factor} slots a choice' for factor in FACTORS},
}
HIDDEN, FEW, MANY = 256, 8, 32
# Lengths of the runs of one slot a choice, as multiples of the steps.
LENGTHS = (0.7, 1.0, 1.4)
ON_CPU = (
  "Measured on a CPU, which has nothing in common with the paper's systems."
)
_BATCHES = 40


def dropless(E: int) -> str:
  """Name of the dropless model of E experts."""
  return f'{E} experts, trained dropless'


def slotted(factor: float, length: float = 1.0) -> str:
  """Name of the model of 32 experts that is trained with slots."""
  longer = f', {length} of the steps' * (length != 1)
  return f'{MANY} experts, trained with {factor} slots a choice{longer}'


SAME_TIME = f'{slotted(1)}, in the time of dropless'


def config(steps: int):
  """The config that the arms share; a group is the whole batch."""
  config = byte_models.decoder(steps, hidden=HIDDEN, num_experts=MANY)
  moe = config.model.moe
  moe.layer_reduce = 'mean'
  moe.router.token_choice.update(balance_weight=0.1, z_weight=0.0)
  return config


def arms(preset: Preset) -> list[Arm]:
  """Models with slots, one of them of three lengths, and dropless ones."""
  slotted_arms = []
  for factor in FACTORS:
    slots = {'capacity.per_assignment.factor': float(factor)}
    for length in LENGTHS if factor == 1 else (1.0,):
      arm = top_k(slotted(factor, length), 1, HIDDEN, slots)
      steps = {'total_steps': round(length * preset.steps)}
      slotted_arms.append(Arm(arm.name, {**arm.overrides, **steps}))
  return slotted_arms + [
    top_k(dropless(E), 1, HIDDEN, {'num_experts': E, **byte_models.ROOM})
    for E in (FEW, MANY)
  ]


def rows_and_drops(
  load: Int[np.ndarray, ' E'],
) -> dict[str, tuple[float, float]]:
  """Rows for each choice, and the share that is dropped, by way of serving."""
  total, mean = load.sum(), load.sum() / len(load)
  served = {'fullest': (float(load.max() / mean), 0.0)}
  for b in BLOCKS:  # every expert's rows are a multiple of the block
    served[f'blocks_{b}'] = float((-(-load // b) * b).sum() / total), 0.0
  for factor in FACTORS:
    slots = int(np.ceil(factor * mean))
    lost = float(np.maximum(load - slots, 0).sum() / total)
    served[f'slots_{factor}'] = slots / mean, lost
  return served


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Rows and drops of the routing of a dropless model, by way of serving.

  A group is a whole batch. A model that drops is not measured.

  Returns:
    Means over validation batches, `routing/layer_<i>/<way>/<what>`: rows, the
    number that is multiplied for each choice; dropped, the share of choices
    that would be.
  """
  if run.model.stacks.moe.capacity.binds:
    return {}
  measures = {}
  for number, layer in routing.last_layers(run, state, _BATCHES).items():
    batch_tokens = layer.header.batch_size * layer.length
    by_batch = [rows_and_drops(x) for x in routing.loads(layer, batch_tokens)]
    for way in WAYS:
      rows, lost = np.mean([shares[way] for shares in by_batch], 0)
      shares = {'rows': float(rows), 'dropped': float(lost)}
      measures[f'layer_{number}/{way}'] = shares
  return routing.named(measures)


def rows(results: parts.Results, times: Mapping[str, StepTime]) -> list[Row]:
  """Rows of trained models, of one at equal time, and of ways to serve."""
  trained_rows = []
  for name, runs in results.items():
    seconds = {'step time': [*times[name].ratios]} if name in times else {}
    trained_rows.append(parts.row_of(name, runs, COLUMNS[:2]).plus(seconds))
  by_length = [
    [byte_models.LOSS.of(run) for run in results[slotted(1, length)]]
    for length in LENGTHS
  ]
  ratios = times[dropless(MANY)].ratios
  losses = tables.at_length(ratios, LENGTHS, by_length)
  return [
    *trained_rows,
    Row(SAME_TIME, {byte_models.LOSS.name: losses}),
    *(
      routing.row_at(
        f'{E} experts, {name}', results[dropless(E)], COLUMNS[2:4], f'*/{way}'
      )
      for E in (FEW, MANY)
      for way, name in WAYS.items()
    ),
  ]


COLUMNS = [
  byte_models.LOSS,
  parts.percent('dropped', byte_models.DROP_RATE),
  Column('rows', 'routing/*/rows', 'a choice', 2, bounds=parts.POSITIVE),
  parts.percent('would drop', 'routing/*/dropped'),
  Column('step time', '', 'x of 1 slot', 2, bounds=parts.POSITIVE),
]


CLAIMS = {
  **{
    f'blocks of 32 pad less than the slots of the fullest, {E} experts': (
      f'rows: {E} experts, blocks of 32 < {E} experts, slots of the fullest'
    )
    for E in (FEW, MANY)
  },
  **{
    f'more experts pad more: {x}': f'rows: 32 experts, {x} > 8 experts, {x}'
    for x in ('blocks of 32', 'slots of the fullest')
  },
  'more experts drop more at one slot a choice': (
    'would drop: 32 experts, 1 slots a choice > 8 experts, 1 slots a choice'
  ),
  'two slots a choice still drop': (
    'would drop: 32 experts, 2 slots a choice > 0'
  ),
  **{
    f'dropless is better than {factor} slots a choice, at equal steps': (
      f'loss: {dropless(MANY)} < {slotted(factor)}'
    )
    for factor in (1, 1.5)
  },
  'it is better than one slot a choice in equal time': Claim(
    f'loss: {dropless(MANY)} < {SAME_TIME}', note=ON_CPU
  ),
  'a dropless step takes less time than one with two slots a choice': Claim(
    f'step time: {dropless(MANY)} < {slotted(2)}', note=ON_CPU
  ),
}
STUDY = Study(
  name='megablocks_tables',
  title='Dropless experts: padding, drops and quality',
  source='MegaBlocks (directions alone)',
  config=config,
  arms=arms,
  rows=rows,
  presets={
    'quick': parts.trial(100, 3, why='drops have hardly cost anything'),
    'full': Preset(400, 5, burst_for_each_seed=True),
  },
  columns=COLUMNS,
  claims=CLAIMS,
  measure=measure,
  timed=[*map(slotted, FACTORS), dropless(MANY)],
  figure=Figure(['loss', 'dropped', 'rows', 'would drop']),
  remarks='Rows and drops of the ways to serve are computed from the routing '
  'of the dropless models, which were trained without blocks or slots.',
  written='2026-11-29',
)
get_config, get_items = command.entries(STUDY, __name__)
