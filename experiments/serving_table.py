"""One trained sparse model, served in every way that makes it smaller.

    python -m experiments.serving_table --preset=quick

An encoder-decoder of bytes translates from English into four languages. Its
encoder routes by token and its decoder by target language, the best pair of
Kudugunta et al. 2021 (https://arxiv.org/abs/2110.03742). Beside it stand its
dense twin, trained for as many steps, a twin that learns from it (Switch,
section 4.2), the model that is extracted of it for each language, the model
with a half and a quarter of its experts, merged by outputs (HC-SMoE) and pruned
by REAP, and the model with experts in 8 and 4 bits and in QMoE's ternary codes,
chosen by GPTQ. Nothing is trained after it was made small.

All are written as they are served, their parameters alone in one file. The
loss and the score are means over the languages, those of extracted models each
of its own language. Tokens a second are measured as a ratio to the dense
twin's, in interleaved rounds of one process, while another run may have the
other core. The claims were written before any result was seen.
"""

import functools
import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure as Canvas

from configs import base
from experiments import kudugunta_table
from experiments.kudugunta_table import LANGUAGE_LOSSES, LANGUAGES
from experiments.study import byte_models, command, served
from experiments.study.jobs import layered
from experiments.study.parts import (
  Arm,
  Change,
  Claim,
  Column,
  Figure,
  Preset,
  Results,
  Row,
)
from experiments.study.starts import Start
from experiments.study.study import Study
from experiments.study.tables import Interval
from moe_jax.compression import extract, fewer, merge, prune, whole_run
from moe_jax.compression.quantize import quantize
from moe_jax.evaluation import SourceScores
from moe_jax.layers.kernel_format import KernelFormat
from moe_jax.run_config import RunConfig

SPARSE, DENSE, DISTILLED, EXTRACTED = (
  'sparse',
  'dense',
  'distilled',
  'extracted',
)
EXPERTS = 16
# The number of experts that stay, by the words for the share.
LEFT = {'a half': 8, 'a quarter': 4}
FORMATS = ('int8', 'int4', 'ternary')
SCORES = 'scores'
BATCHES = 16  # of the training split, which merging, pruning and GPTQ read
SAME = 0.002  # nats a byte that 8 bits may add and count as none
# An extracted model computes what the whole does, but for rounding.
EXACT = 0.0005


def _of_each(task: str) -> tuple[Column, Column]:
  """Columns of the loss and the score of one language, or of their 'mean'."""
  return (
    Column('loss', f'eval/{LANGUAGE_LOSSES}/{task}', 'nats/byte'),
    Column('chrF', f'eval/{SCORES}/{task}', digits=1),
  )


def _in_millions(number: float) -> float:
  return number / 1e6


LOSS, SCORE = _of_each('mean')
SIZES = (
  Column('disk', 'disk', 'MB', 2, _in_millions),
  Column('memory', 'memory', 'MB', 2, _in_millions),
  Column('work', 'flops', 'MFLOP/token', 2, _in_millions),
  Column('tokens a second', 'tokens_per_second', digits=0),
  Column('speed', 'speed', 'x of dense', 2),
)
MEMORY = SIZES[1]


def config(steps: int):
  """The config of the sparse model."""
  config = kudugunta_table.config(steps)
  m = config.model
  m.width = 128
  m.ffn.hidden = 512
  m.moe.layers = 'all'
  m.moe.num_experts = EXPERTS
  m.moe.expert.hidden = 256
  del config.evals[byte_models.EVAL]
  config.evals[SCORES] = base.entry(
    SourceScores, every_steps=0, num_questions=32, num_tokens=48
  )
  config = base.finish(config)
  return layered(
    RunConfig, config, kudugunta_table.arm('token', 'task').overrides
  )


def dense_twin(shared):
  """The config of the dense twin of the sparse model."""
  config = shared.copy_and_resolve_references().unlock()
  config.model.encoder.overrides = {}
  return layered(RunConfig, config, {'model.moe.num_experts': 0})


def _trained(shared):
  """The config of a start, whose scores are those of the arm that copies it."""
  config = shared.copy_and_resolve_references().unlock()
  del config.evals[SCORES]
  return base.finish(config)


def starts(preset: Preset) -> list[Start]:
  """The sparse model, its dense twin, and the twin that learns from it."""
  del preset

  def dense(shared):
    return dense_twin(_trained(shared))

  return [
    Start(SPARSE, _trained),
    Start(DENSE, dense),
    Start(DISTILLED, dense, teacher=SPARSE),
  ]


def _measured(new: pathlib.Path) -> dict[str, float]:
  return served.measure(new, dense_twin(config(1)), LANGUAGES[0])


def copied(run: pathlib.Path, new: pathlib.Path) -> Mapping[str, float]:
  """Writes a trained run as it is served, as a change of an arm."""
  whole = whole_run.read(run)
  whole_run.write(whole, new, whole.variables['params'], packed=True)
  return _measured(new)


def extracted(
  run: pathlib.Path, new: pathlib.Path, *, task: str
) -> Mapping[str, float]:
  """Extracts the model of one language, as a change of an arm."""
  whole = whole_run.read(run)
  own = extract.of_run(whole, task)
  whole_run.write(whole, new, own.params, own.options, packed=True)
  return _measured(new)


def merged(
  run: pathlib.Path, new: pathlib.Path, *, left: int, batches: int
) -> Mapping[str, float]:
  """Merges the experts that are alike, as a change of an arm."""
  before = fewer.calibrated(whole_run.read(run), batches)
  counts = fewer.numbers(str(left), before.layers)
  layers = merge.merge(before, counts, group_by='outputs', rule='clusters')
  return _fewer(before, layers, merge.TIED, new)


def pruned(
  run: pathlib.Path, new: pathlib.Path, *, left: int, batches: int
) -> Mapping[str, float]:
  """Prunes experts, as a change of an arm."""
  before = fewer.calibrated(whole_run.read(run), batches)
  counts = fewer.numbers(str(left), before.layers)
  layers = prune.prune(before, counts, score='reap')
  return _fewer(before, layers, fewer.SHRUNK, new)


def _fewer(before, layers, router: str, new: pathlib.Path):
  options, params = fewer.smaller(before.run, layers, router)
  whole_run.write(before.run, new, params, options, packed=True)
  return _measured(new)


def quantized(
  run: pathlib.Path, new: pathlib.Path, *, format: str, batches: int
) -> Mapping[str, float]:
  """Writes experts in codes of few bits, as a change of an arm."""
  quantize(run, new, KernelFormat(format), num_batches=batches)
  return _measured(new)


def _made_of_it() -> dict[str, Change]:
  """The changes of the trained sparse model, by the name of the arm."""
  changes: dict[str, Change] = {
    f'{EXTRACTED} {task}': functools.partial(extracted, task=task)
    for task in LANGUAGES
  }
  for name, change in {'merged': merged, 'pruned': pruned}.items():
    for share, left in LEFT.items():
      changes[f'{name} to {share}'] = functools.partial(
        change, left=left, batches=BATCHES
      )
  for format in FORMATS:
    changes[format] = functools.partial(
      quantized, format=format, batches=BATCHES
    )
  return changes


def arms(preset: Preset) -> list[Arm]:
  """An arm for each model that is served."""
  del preset
  as_trained = [
    Arm(f'{name}, served', {}, start=name, change=copied)
    for name in (SPARSE, DENSE, DISTILLED)
  ]
  return as_trained + [
    Arm(name, {}, start=SPARSE, change=change)
    for name, change in _made_of_it().items()
  ]


def rows(results: Results, times: Mapping[str, float]) -> list[Row]:
  """A row for each model; those that are extracted have one together."""
  del times
  parts = {
    task: results[name]
    for task in LANGUAGES
    if (name := f'{EXTRACTED} {task}') in results
  }
  made = []
  for name, runs in results.items():
    if name.startswith(EXTRACTED):
      if any(row.name == EXTRACTED for row in made):
        continue
      each = [_values((*_of_each(t), *SIZES), r) for t, r in parts.items()]
      means = {
        column: np.mean([values[column] for values in each], 0).tolist()
        for column in each[0]
      }
      made.append(Row(EXTRACTED, means))
    elif name not in (SPARSE, DENSE, DISTILLED):
      values = _values((LOSS, SCORE, *SIZES), runs)
      made.append(Row(name.removesuffix(', served'), values))
  return made


def _values(columns, runs) -> dict[str, list[float]]:
  return {column.name: [*map(column.of, runs)] for column in columns}


def pictures(results: Results, folder: pathlib.Path) -> None:
  """Draws the loss and the score of each model against its bytes in memory."""
  figure = Canvas(figsize=(10, 4.6), layout='constrained')
  for ax, column in zip(figure.subplots(1, 2), (LOSS, SCORE), strict=True):
    for number, row in enumerate(rows(results, {})):
      size = np.mean(row.values[MEMORY.name])
      interval = Interval.of(row.values[column.name])
      bar = np.nan_to_num(interval.half_width, posinf=0.0)
      style = dict(color=f'C{number % 10}', marker='osD^'[number // 10])
      ax.errorbar(size, interval.mean, bar, capsize=3, **style)
      place = dict(xytext=(5, 4), textcoords='offset points', fontsize=8)
      ax.annotate(row.name, (size, interval.mean), **place)
    ax.set_xscale('log', base=2)
    ax.xaxis.set_major_formatter('{x:g}')
    ax.margins(x=0.15)
    ax.set_xlabel(f'parameters in memory ({MEMORY.unit})')
    ax.set_ylabel(f'{column.name} {column.unit and f"({column.unit})"}')
  figure.savefig(folder / 'quality_and_bytes.png', dpi=110)


def _claims() -> list[Claim]:
  """What the papers say of each way, as far as it can be compared here."""
  table6 = 'switch2021/table6'
  return [
    Claim(
      'the sparse model is better than its dense twin',
      f'loss: {SPARSE} < {DENSE}',
      [f'taskmoe2021/routing/{n}/bleu' for n in ('token-target', 'dense')],
      'BLEU there, where higher is better; loss here.',
    ),
    Claim(
      'a twin that learns from the sparse model is better than one alone',
      f'loss: {DISTILLED} < {DENSE}',
      [f'{table6}/{n}/nlp' for n in ('+ 0.75 hard, 0.25 soft mix', 'T5-Base')],
      'It begins with weights of the teacher, whose steps it has behind it.',
    ),
    Claim(
      'the distilled twin keeps a part of the gain alone',
      f'loss: {DISTILLED} > {SPARSE}',
      [
        f'{table6}/{n}/nlp'
        for n in ('+ 0.75 hard, 0.25 soft mix', 'teacher 3.8B')
      ],
    ),
    Claim(
      'extraction changes nothing',
      f'loss: {EXTRACTED} = {SPARSE} within {EXACT}',
    ),
    Claim(
      'an extracted model generates faster',
      f'speed: {EXTRACTED} > {SPARSE}',
      [
        f'taskmoe2021/extraction/{name}/throughput'
        for name in ('extracted', 'whole')
      ],
      'There on 32 devices, which need no exchange for it.',
    ),
    *(
      Claim(
        f'to prune to {share} is better than to merge',
        f'loss: pruned to {share} < merged to {share}',
        note='REAP says so of models that generate.',
      )
      for share in LEFT
    ),
    Claim(
      'experts in 8 bits lose nothing', f'loss: int8 = {SPARSE} within {SAME}'
    ),
    Claim(
      'with experts in ternary codes the model is better than the dense twin',
      f'loss: ternary < {DENSE}',
    ),
    Claim(
      'with experts in ternary codes the model is smaller than with 4 bits',
      'memory: ternary < int4',
    ),
    Claim(
      'decoding of ternary codes costs speed', f'speed: ternary < {SPARSE}'
    ),
  ]


STUDY = Study(
  name='serving_table',
  title='One sparse model, served in every smaller form',
  source='Kudugunta et al. 2021, Switch, HC-SMoE, REAP and QMoE',
  config=config,
  arms=arms,
  rows=rows,
  starts=starts,
  presets={
    'quick': Preset(300, 2, without=['* to a quarter', 'int4']),
    'full': Preset(800, 3),
  },
  columns=[LOSS, SCORE, *SIZES],
  claims=_claims(),
  figure=Figure(['loss', 'memory', 'speed']),
  pictures=pictures,
  remarks='Sizes are those of all parameters, as float32 where they are not in '
  'codes. Work leaves out the decoding of codes. Experts are narrow, so that '
  'scales and offsets take more of a ternary expert than in QMoE. '
  'quality_and_bytes.png shows loss and score against bytes.',
  length=lambda preset: f'{preset.steps:,} steps, then made small',
  tasks=kudugunta_table.STUDY.tasks,
)
get_config = STUDY.get_config

if __name__ == '__main__':
  command.main(STUDY)
