"""Dense or sparse: which wins at equal parameters, FLOPs, memory, time, tokens?

    python -m experiments.dense_or_sparse --preset=quick

A hundred blog posts ask this question, and no single table answers it, since
every table holds something else equal, and since repeated text is often counted
as if it were new.

Here: byte-level decoders of two layers. The sparse one has 4 experts, of which
a token has one, and drops nothing. Its dense twin has its FLOPs, and a wide
dense model its parameters, so that weights, gradients and both moments of the
optimizer take equal memory. Activations do not: at this size they are most of
the memory, and the wide model keeps the most (counted, see the columns). The
wide model also stands at as many FLOPs and at as much time as the sparse one,
and the twin at as much time: losses of runs of other lengths, each annealed by
itself, are interpolated by the logarithm of the length. Times are those of a
step on this machine, measured.

Runs read distinct bytes once, or an eighth or a half of them 8 or 2 times.
Amounts are scaled to minutes on two cores, 0.06 to 1.0 MB in the full preset,
far from the 0.5 to 20 MB that the question is about; models are as small, so
that there are 0.5 to 8 bytes for each active parameter. All models are
evaluated on the same validation text.

The quick preset has too little text for any claim. The full preset, 17 arms and
5 seeds, was planned for 20 minutes on two idle cores; its runs took 50 core
minutes. The claims were written before any run.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.study import byte_models, command, finetuned, parts, tables
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from experiments.study.tasks import Task
from experiments.study.times import StepTime
from moe_jax.analysis import cost, counts, memory
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

SPARSE, TWIN, WIDE = 'sparse', 'dense of equal FLOPs', 'wide dense'
HIDDEN, EXPERTS = 256, 4
MODELS = {
  SPARSE: {},
  TWIN: {'model.moe.num_experts': 0},
  WIDE: {'model.moe.num_experts': 0, 'model.ffn.hidden': HIDDEN * EXPERTS},
}
# Distinct text as a share of the text that a run of full length reads, and the
# number of times that it is read.
TEXTS = ((1 / 8, 1), (1 / 8, 8), (1 / 2, 2), (1, 1), (2, 1))
# Further lengths of the wide model's runs, on new text, for interpolation.
LENGTHS = (1 / 4, 1 / 2)
TOKENS = 1024  # number of bytes that a step reads
GAIN = 'sparse minus dense of equal FLOPs'
FLOPS, TIME = 'of equal FLOPs', 'in equal time'
TRAINED = 'trained'
FIRST_BYTES = 'the first bytes of the Python standard library'


def config(steps: int):
  """The config of the sparse model, which reads every byte once."""
  config = byte_models.decoder(
    steps, hidden=HIDDEN, num_experts=EXPERTS, drops=False
  )
  config.batch_size = TOKENS // config.data.seq_len
  config.evals[TRAINED] = byte_models.evaluation(split='train')
  return config


def of_text(model: str, share: float, epochs: int) -> str:
  """Name of the arm of a model that reads a share of the text some times."""
  return f'{model}, text x {share:g}, {epochs} epoch{"s" * (epochs > 1)}'


def of_length(length: float) -> str:
  """Name of the arm of the wide model that trains for another length."""
  return f'{WIDE}, {length:g} x the steps'


def arms(preset: Preset) -> list[Arm]:
  """Each model on each text, and other lengths of the wide dense one."""
  runs = [(m, *text, of_text(m, *text)) for m in MODELS for text in TEXTS]
  runs += [(WIDE, length, 1, of_length(length)) for length in LENGTHS]
  all_arms = []
  for model, share, epochs, name in runs:
    train_bytes = round(preset.steps * TOKENS * share)
    overrides = {
      **MODELS[model],
      'data.source.python_stdlib.train_bytes': train_bytes,
      'total_steps': max(round(preset.steps * share * epochs), 2),
    }
    read = 'read once' if epochs == 1 else 'read again up to 1 x'
    line = '' if share in LENGTHS and epochs == 1 else f'{model}, {read}'
    all_arms.append(Arm(name, overrides, line))
  return all_arms


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Counts the cost of a run and the text that it has read.

  Returns:
    Numbers by name: cost/params; cost/flops of training for a token;
    cost/memory in bytes of weights, gradients and optimizer; cost/activations
    in bytes for a batch; data/distinct in bytes; data/epochs.
  """
  del state
  options, model = run.options, run.model
  B, T = options.batch_size, options.data.seq_len
  count = counts.count(model, T)
  trained = cost.training_cost(options, model)
  optimizing = trained.optimizer_bytes + trained.gradient_bytes
  rows = len(run.dataset.splits['train'])
  return {
    'cost/params': count.total_params,
    'cost/flops': count.training_flops,
    'cost/memory': optimizing + memory.weight_bytes(model, 'float32'),
    'cost/activations': sum(memory.activations(model, B, T)),
    'data/distinct': rows * T,
    'data/epochs': options.total_steps * B / rows,
  }


def _in_millions(number: float) -> float:
  return number / 1e6


DISTINCT, GAP = 'distinct text', finetuned.GAP.name
COLUMNS = [
  byte_models.LOSS,
  dataclasses.replace(
    byte_models.LOSS, name='training loss', key=f'eval/{TRAINED}/loss'
  ),
  Column(GAP, unit='nats/byte'),
  Column(DISTINCT, 'data/distinct', 'MB', 2, _in_millions),
  Column('epochs', 'data/epochs', digits=1),
  Column('parameters', 'cost/params', 'k', 0, lambda x: x / 1e3),
  Column('FLOPs', 'cost/flops', 'M/byte', 2, _in_millions),
  Column('memory of state', 'cost/memory', 'MB', 1, _in_millions),
  Column('memory of activations', 'cost/activations', 'MB', 1, _in_millions),
]
TIMED = [of_text(model, 1, 1) for model in MODELS]


@functools.cache
def wide_flops() -> float:
  """The FLOPs of the wide dense model over those of the sparse one."""
  flops = functools.partial(byte_models.training_flops, config(8))
  return flops(MODELS[WIDE]) / flops(MODELS[SPARSE])


def rows(results: parts.Results, times: Mapping[str, StepTime]) -> list[Row]:
  """The arms that were run, gains by text, and rows at equal cost.

  A row at equal FLOPs or in equal time has the loss that a dense model would
  have after fewer or more steps than the sparse one, on new text.
  """
  table, loss = {}, byte_models.LOSS.name
  for arm in arms(Preset(8, 1)):
    if arm.name in results:
      row = finetuned.with_gap(STUDY.row_of(arm, results))
      if arm.line:
        row = dataclasses.replace(row, x=float(np.mean(row.values[DISTINCT])))
      table[arm.name] = row
  for text in TEXTS:
    sparse, twin = (table.get(of_text(m, *text)) for m in (SPARSE, TWIN))
    if sparse and twin:
      name = of_text(GAIN, *text)
      gain = finetuned.minus(name, sparse, twin).values
      values = {column: gain[column] for column in (loss, GAP)}
      table[name] = Row(name, values, difference=True)
  lengths = {(WIDE, FLOPS): [1 / wide_flops()]}
  if times:
    sparse_ratios, *others = (times[name].ratios for name in TIMED)
    for model, ratios in zip((TWIN, WIDE), others, strict=True):
      lengths[model, TIME] = np.divide(sparse_ratios, ratios)
  for (model, cost_name), at in lengths.items():
    name = f'{model} {cost_name}'
    table[name] = Row(name, {loss: _losses_at(table, model, at)})
  return list(table.values())


def _losses_at(
  table: Mapping[str, Row], model: str, lengths: Sequence[float]
) -> list[float]:
  """Losses of a model on new text by seed, at the lengths in turn."""
  names = {share: of_text(model, share, 1) for share, n in TEXTS if n == 1}
  names |= {x: of_length(x) for x in LENGTHS if model == WIDE}
  known = sorted(x for x, name in names.items() if name in table)
  losses = [table[names[x]].values[byte_models.LOSS.name] for x in known]
  return tables.at_length(lengths, known, losses)


def claims() -> parts.Claims:
  """Directions that plain reasoning predicts; no number was published."""
  once, eighth, repeated = (1, 1), (1 / 8, 1), (1 / 8, 8)
  sparse = of_text(SPARSE, *once)
  loss = 'loss: {} {} {}'.format
  return {
    'at equal FLOPs and tokens sparse wins': loss(
      sparse, '<', of_text(TWIN, *once)
    ),
    'at equal parameters, memory of their state and tokens dense wins': Claim(
      loss(sparse, '>', of_text(WIDE, *once)),
      note='The dense model costs more FLOPs and time.',
    ),
    'at equal parameters and FLOPs sparse wins': Claim(
      loss(sparse, '<', f'{WIDE} {FLOPS}'),
      note='The dense model reads fewer tokens.',
    ),
    'at equal parameters, memory of their state and time sparse wins': loss(
      sparse, '<', f'{WIDE} {TIME}'
    ),
    'in equal time sparse wins against the twin': Claim(
      loss(sparse, '<', f'{TWIN} {TIME}'), note='The twin reads more tokens.'
    ),
    'sparse gains more over its twin from eight times the text, read once': (
      loss(of_text(GAIN, *once), '<', of_text(GAIN, *eighth))
    ),
    'sparse gains less from eight epochs of an eighth than from new text': loss(
      of_text(GAIN, *repeated), '>', of_text(GAIN, *once)
    ),
    **{
      f'repeated bytes are worth less than new ones, {model}': loss(
        of_text(model, *repeated), '>', of_text(model, *once)
      )
      for model in (SPARSE, TWIN)
    },
    'yet they are worth something: eight epochs are better than one': loss(
      of_text(SPARSE, *repeated), '<', of_text(SPARSE, *eighth)
    ),
    'after eight epochs sparse overfits more than its twin': (
      f'{GAP}: {of_text(GAIN, *repeated)} > 0'
    ),
    'two epochs of half of the text are as good as one of all, sparse': Claim(
      loss(of_text(SPARSE, 1 / 2, 2), '=', f'{sparse} within 0.03'),
      note='That a few epochs are worth nearly as much as new text is said of '
      'large dense models. The bound is ours.',
    ),
  }


STUDY = Study(
  name='dense_or_sparse',
  title='Dense or sparse, by what is held equal and how much text there is',
  source='A question of many blog posts',
  config=config,
  arms=arms,
  rows=rows,
  presets={
    'quick': Preset(
      150,
      3,
      without=['*, text x 2, *', '*, text x 0.5, *'],
      underpowered='an eighth of the text is 20 kB, and no run is past 150 '
      'steps',
    ),
    'full': Preset(500, 5, burst_for_each_seed=True),
  },
  columns=COLUMNS,
  claims=claims(),
  gates={
    f'loss: {of_text(SPARSE, 1, 1)} < {of_text(TWIN, 1, 1)}': [
      'sparse gains*',
      '*overfits*',
    ]
  },
  figure=Figure(
    ['loss', GAP],
    'distinct text, MB',
    log_x=True,
    without=[f'{GAIN}*', *map(of_length, LENGTHS)],
  ),
  measure=measure,
  timed=TIMED,
  remarks='"Text x 1" is as much text as a run of the usual number of steps '
  'reads. Text that is read again is read up to that amount. The gap is the '
  'loss of the validation split less that of the text that was trained on. '
  'Memory is counted; the state is weights, gradients and moments.',
  tasks={'text': Task({'data.source.kind': 'python_stdlib'}, FIRST_BYTES)},
  written='2026-11-29',
)
get_config, get_items = command.entries(STUDY, __name__)
