"""One trained sparse model, served in every way that makes it smaller.

    python -m experiments.serving_table --preset=quick

An encoder-decoder of bytes translates from English into four languages. Its
encoder routes by token and its decoder by target language, the best pair of
Kudugunta et al. 2021 (https://arxiv.org/abs/2110.03742). Beside it stand its
dense twin, a twin of twice as many steps, a twin that learns from the sparse
model (Switch, section 4.2), the model that is extracted of it for each
language, the model with a half and a quarter of its experts, merged by outputs
(HC-SMoE) and pruned by REAP, and the model with experts in 8 and 4 bits and in
QMoE's ternary codes, chosen by GPTQ. What is extracted, merged, pruned or
quantised is not trained afterwards.

All are written as they are served, their parameters alone in one file. The
loss and the score are means over the languages, those of extracted models each
of its own language. All generate for the same prompts, four of each language.
The speed is a ratio to the dense twin's, in interleaved rounds of one process,
while another run may have the other core; tokens a second are of the same
rounds. Claims on extraction, on the distilled twin and on the speed of ternary
codes were changed, and notes were added, after trial runs of 10 and 20 steps
and a review; no result of this size had been seen.
"""

import functools
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import kudugunta_table
from experiments.benchmarks import timing
from experiments.kudugunta_table import LANGUAGE_LOSSES, LANGUAGES
from experiments.qmoe_table5 import BATCHES, SAME
from experiments.study import byte_models, command, parts
from experiments.study.jobs import layered
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from moe_jax import data, generation, run_config
from moe_jax.analysis import counts
from moe_jax.compression import extract, fewer, merge, whole_run
from moe_jax.compression.quantize import quantize
from moe_jax.compression.whole_run import bytes_in_memory, bytes_on_disk
from moe_jax.configs import base
from moe_jax.errors import InputError
from moe_jax.evaluation import SourceScores
from moe_jax.kernels.kernel_format import KernelFormat
from moe_jax.models import code_trees
from moe_jax.models.trees import init_params
from moe_jax.run_config import RunConfig
from moe_jax.runs import workdir

SPARSE, DENSE, DISTILLED = 'sparse', 'dense', 'distilled'
LONG = 'dense, twice the steps'
TRAINED = (SPARSE, DENSE, LONG, DISTILLED)
EXTRACTED, ALL_EXTRACTED = 'extracted, one language', 'extracted, all languages'
EXPERTS = 16
# The number of experts that stay, by the words for the share.
LEFT = {'a half': 8, 'a quarter': 4}
# The most that four languages use of a decoder's layer, each two of them.
IN_USE = 8
FORMATS = ('int8', 'int4', 'ternary')
SCORES = 'scores'


def _of_each(task: str) -> tuple[Column, Column]:
  """Columns of the loss and the score of one language, or of their 'mean'."""
  return (
    Column('loss', f'eval/{LANGUAGE_LOSSES}/{task}', 'nats/byte'),
    Column('chrF', f'eval/{SCORES}/{task}', digits=1),
  )


def _in_millions(number: float) -> float:
  return number / 1e6


LOSS, SCORE = _of_each('mean')
DISK = Column('disk', 'disk', 'MB', 2, _in_millions)
MEMORY = Column('memory', 'memory', 'MB', 2, _in_millions)
SIZES = (
  DISK,
  MEMORY,
  Column('work', 'flops', 'MFLOP/token', 2, _in_millions),
  Column('tokens a second', 'tokens_per_second', digits=0),
  Column('speed', 'speed', 'x of dense', 2),
)


def config(steps: int):
  """The config of the sparse model."""
  config = kudugunta_table.config(steps)
  config.data.target_len = 128  # Cyrillic letters are two bytes
  m = config.model
  m.update(dropout=0.1, width=128)
  m.ffn.hidden = 512
  m.moe.update(layers='all', num_experts=EXPERTS)
  m.moe.expert.hidden = 256
  del config.evals[byte_models.EVAL]
  config.evals[SCORES] = base.entry(
    SourceScores, every_steps=0, num_questions=32, num_tokens=128
  )
  routers = kudugunta_table.arm('token', 'task').overrides
  return layered(RunConfig, base.finish(config), routers)


def dense_twin(shared):
  """The config of the dense twin of a model of this study."""
  config = shared.copy_and_resolve_references().unlock()
  config.model.encoder.overrides = {}
  return layered(RunConfig, config, {'model.moe.num_experts': 0})


def _trained(shared):
  """The config of a start, whose scores are measured on a copy of it."""
  config = shared.copy_and_resolve_references().unlock()
  del config.evals[SCORES]
  return base.finish(config)


def starts(preset: Preset) -> list[parts.Start]:
  """The sparse model, its dense twins, and the twin that learns from it."""
  steps = 2 * preset.steps
  twice = {'total_steps': steps, 'log_every_steps': max(steps // 10, 1)}

  def dense(shared):
    return dense_twin(_trained(shared))

  return [
    parts.Start(SPARSE, _trained),
    parts.Start(DENSE, dense),
    parts.Start(LONG, dense, overrides=twice),
    parts.Start(DISTILLED, dense, teacher=SPARSE),
  ]


def measure(
  folder: str | os.PathLike[str], twin: ConfigDict
) -> dict[str, float]:
  """Measures the model of a run of an encoder-decoder on a mixture.

  The prompts are as many of each of its tasks, one task after another.

  Args:
    folder: The run's folder.
    twin: The config of the model whose speed is the unit. Its parameters are
      drawn anew, as speed does not depend on what a dense model has learned.

  Returns:
    Numbers by name: 'disk' and 'memory', the bytes of all parameters as they
    are stored; 'flops', those of the forward pass for a token, averaged over
    the tokens that the encoder reads and those that are generated;
    'tokens_per_second', of all prompts together; 'speed', that as a ratio to
    the twin's, the median of interleaved rounds.

  Raises:
    ValueError: The prompts cannot be divided over the tasks, or a task has too
      few rows of validation for its own.
  """
  run = generation.load(folder)
  described = run.options
  plain = code_trees.with_formats(described.model).build()
  cost = counts.count(plain, described.data.seq_len, described.data.target_len)
  options = run_config.read(twin).filled(run.tokenizer.vocab_size)
  dense = options.build()
  params = init_params(dense, jax.random.key(0))
  datasets = data.load(described.data).parts
  num_prompts = kudugunta_table.PROMPTS
  prompts_per_task, remainder = divmod(num_prompts, len(datasets))
  if remainder:
    over = f'{len(datasets)} tasks'
    raise InputError(f'{num_prompts} prompts cannot be divided over {over}')
  prompts, tasks = [], []
  for number, name in enumerate(described.data.tasks):
    split = datasets[name].splits['validation']
    prompts += kudugunta_table.prompts_of(split, prompts_per_task)
    tasks += [number] * prompts_per_task
  inputs, generating = (run.tokenizer, prompts), kudugunta_table.generating
  own_tasks = tasks if described.model.routes_by_task else None
  times = timing.interleave(
    {
      'twin': generating(dense, {'params': params}, *inputs),
      'own': generating(run.model, run.variables, *inputs, own_tasks),
    },
    seconds=kudugunta_table.SECONDS,
  )
  seconds = timing.Spread.of(times['own']).median
  return {
    'disk': bytes_on_disk(folder),
    'memory': bytes_in_memory(run.variables),
    'flops': cost.forward_flops,
    'tokens_per_second': len(prompts) * kudugunta_table.TOKENS / seconds,
    'speed': timing.ratio(times['twin'], times['own']).median,
  }


def _measured(run: pathlib.Path, new: pathlib.Path) -> dict[str, float]:
  """Measures a model; the unit is the twin of the run that it is made of."""
  options = run_config.from_file(run / workdir.CONFIG)
  return measure(new, dense_twin(options))


def copied(run: pathlib.Path, new: pathlib.Path) -> Mapping[str, float]:
  """Writes a trained run as it is served, as a change of an arm."""
  whole = whole_run.read(run)
  whole_run.write(whole, new, whole.variables['params'])
  return _measured(run, new)


def extracted(
  run: pathlib.Path, new: pathlib.Path, *, task: str
) -> Mapping[str, float]:
  """Extracts the model of one language, as a change of an arm."""
  whole = whole_run.read(run)
  small = extract.of_run(whole, task)
  whole_run.write(whole, new, small.params, small.options)
  return _measured(run, new)


def merged(
  run: pathlib.Path, new: pathlib.Path, *, left: int, batches: int
) -> Mapping[str, float]:
  """Merges the experts whose outputs are alike, as a change of an arm."""
  return _with_fewer(merge.merge, run, new, left, batches)


def pruned(
  run: pathlib.Path, new: pathlib.Path, *, left: int, batches: int
) -> Mapping[str, float]:
  """Prunes experts by REAP, as a change of an arm."""
  return _with_fewer(fewer.prune, run, new, left, batches)


def _with_fewer(method, run, new, left, batches) -> dict[str, float]:
  """Writes the run with the layers that a method makes of measured ones."""
  before = fewer.calibrated(whole_run.read(run), batches)
  layers = method(before, fewer.numbers(str(left), before.layers))
  options, variables = fewer.smaller(before.run, layers)
  state = variables.get('router_state')
  whole_run.write(
    before.run, new, variables['params'], options, router_state=state
  )
  return _measured(run, new)


def quantized(
  run: pathlib.Path, new: pathlib.Path, *, format: str, batches: int
) -> Mapping[str, float]:
  """Writes experts in codes of few bits, as a change of an arm."""
  quantize(run, new, KernelFormat(format), num_batches=batches)
  return _measured(run, new)


def extracted_name(task: str) -> str:
  """The name of the arm of the model of one language."""
  return f'extracted {task}'


def _changes() -> dict[str, parts.Change]:
  """The changes of the trained sparse model, by the name of the arm."""
  changes: dict[str, parts.Change] = {
    extracted_name(task): functools.partial(extracted, task=task)
    for task in LANGUAGES
  }
  for name, change in {'merged': merged, 'pruned': pruned}.items():
    change = functools.partial(change, batches=BATCHES)
    for share, num_left in LEFT.items():
      changes[f'{name} to {share}'] = functools.partial(change, left=num_left)
  change = functools.partial(quantized, batches=BATCHES)
  changes |= {x: functools.partial(change, format=x) for x in FORMATS}
  return changes


def arms(_: Preset) -> list[Arm]:
  """An arm for each model that is served."""
  trained = [Arm(f'{x}, served', {}, start=x, change=copied) for x in TRAINED]
  return trained + [
    Arm(name, {}, start=SPARSE, change=change)
    for name, change in _changes().items()
  ]


def rows(results: parts.Results) -> list[Row]:
  """A row for each model; those that are extracted have two together."""
  columns = (LOSS, SCORE, *SIZES)
  table = [parts.row_of(x, results[f'{x}, served'], columns) for x in TRAINED]
  by_language = [
    parts.row_of(task, results[extracted_name(task)], (*_of_each(task), *SIZES))
    for task in LANGUAGES
  ]
  values = {c.name: [x.values[c.name] for x in by_language] for c in columns}
  means = {name: np.mean(x, 0).tolist() for name, x in values.items()}
  sums = {c.name: np.sum(values[c.name], 0).tolist() for c in (DISK, MEMORY)}
  quality = {c.name: means[c.name] for c in (LOSS, SCORE)}
  table += [Row(EXTRACTED, means), Row(ALL_EXTRACTED, quality | sums)]
  names = {extracted_name(task) for task in LANGUAGES}
  return table + [
    parts.row_of(name, results[name], columns)
    for name in _changes()
    if name in results and name not in names
  ]


_IN_ENCODER = ', so that the model loses in the encoder alone'
_TRIAL = 'Changed on 2026-11-27, after trial runs of 10 and 20 steps'


def _claims() -> parts.Claims:
  """The papers' claims on each method, as far as they can be compared here."""
  table6 = 'switch2021/table6'
  return {
    'the sparse model is better than its dense twin': Claim(
      f'loss: {SPARSE} < {DENSE}',
      [f'taskmoe2021/routing/{n}/bleu' for n in ('token-target', 'dense')],
      kudugunta_table.BLEU_NOTE,
    ),
    'a twin that learns from the sparse model is better than one alone': Claim(
      f'loss: {DISTILLED} < {DENSE}',
      [f'{table6}/{n}/nlp' for n in ('+ 0.75 hard, 0.25 soft mix', 'T5-Base')],
      "The distilled twin begins with the teacher's weights, and so has the "
      "teacher's steps behind it, too.",
    ),
    'a twin that learns from it is better than one of twice the steps': Claim(
      f'loss: {DISTILLED} < {LONG}',
      changes=[
        f'{_TRIAL}, in place of "the distilled twin keeps a part of the gain '
        'alone", a higher loss than that of the sparse model.'
      ],
    ),
    'an extracted model generates faster': Claim(
      f'speed: {EXTRACTED} > {SPARSE}',
      note=kudugunta_table.SPEED_IS_OURS,
      changes=kudugunta_table.SPEED_CHANGED,
    ),
    **{
      f'to prune to {share} is better than to merge': Claim(
        f'loss: pruned to {share} < merged to {share}',
        note='REAP says so of models that generate. In the decoder four '
        f'languages use {IN_USE} of the {EXPERTS} experts at most'
        f'{_IN_ENCODER * (num_left >= IN_USE)}.',
      )
      for share, num_left in LEFT.items()
    },
    'experts in 8 bits lose nothing': f'loss: int8 = {SPARSE} within {SAME}',
    'with experts in ternary codes the model is better than the dense twin': (
      f'loss: ternary < {DENSE}'
    ),
    'with experts in ternary codes the model is smaller than with 4 bits': (
      'memory: ternary < int4'
    ),
    'decoding of ternary codes costs speed': Claim(
      'speed: ternary < int8',
      changes=[f'{_TRIAL}; before, against the sparse model.'],
    ),
  }


STUDY = Study(
  name='serving_table',
  title='One sparse model, served in every smaller form',
  source='Kudugunta et al. 2021, Switch, HC-SMoE, REAP and QMoE',
  config=config,
  arms=arms,
  rows=rows,
  starts=starts,
  presets={
    'quick': Preset(80, 2, without=['* to a quarter', 'int4']),
    'full': Preset(200, 3),
  },
  columns=[LOSS, SCORE, *SIZES],
  claims=_claims(),
  gates={'loss: sparse < dense': ['*']},
  figure=Figure(['loss', 'chrF'], 'parameters in memory', against=MEMORY.name),
  written='2026-11-27',
  remarks='Sizes are those of all parameters as they are stored, float32 where '
  'they are not in codes. Work is that of the chosen experts. The decoding of '
  'codes is not counted. Nor are products of experts with tokens that have not '
  'chosen them: all experts multiply all tokens where a batch chooses most of '
  'them, which is faster than to sort its tokens. Experts are narrow, so that '
  'scales and offsets take more of a ternary expert than in QMoE. By '
  'construction an extracted model computes what the whole one does for its '
  'language, but for rounding; to serve all four languages takes four of them. '
  'The data are small: 3,151 pairs of training, which are read many times, and '
  '183 of validation, whose sampling error no interval over seeds contains.',
  length=lambda preset: f'{preset.steps:,} steps, then made small',
  tasks=kudugunta_table.STUDY.tasks,
)
get_config, get_items = command.entries(STUDY, __name__)
