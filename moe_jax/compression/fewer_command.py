"""Writes a run with fewer experts, which are merged or pruned.

    python -m moe_jax.compression merge --run=runs/tiny --output=runs/half \
      --experts=4 --group_by=outputs
    python -m moe_jax.compression prune --run=runs/tiny --output=runs/half \
      --share=0.5 --score=reap

Experts are measured on batches of training data. Training afterwards, with the
original run as the teacher (distillation), recovers what was lost.
"""

import argparse
import pathlib
import shlex
from typing import Any

from moe_jax import cli
from moe_jax.compression import fewer, merge, whole_run
from moe_jax.compression.calibration import SCORES
from moe_jax.compression.whole_run import bytes_in_memory
from moe_jax.data import DataOptions
from moe_jax.data.cache_folders import check_free
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models.expert_arrays import sparse_layers
from moe_jax.runs.workdir import CONFIG_PY


def add(commands: Any) -> None:
  """Adds the commands `merge` and `prune` to the commands of a parser."""
  for verb, meaning in (
    ('merge', 'merges similar experts'),
    ('prune', 'removes the least useful experts'),
  ):
    parser = whole_run.command(commands, verb, _run, meaning, __doc__)
    add = parser.add_argument
    number = parser.add_mutually_exclusive_group(required=True)
    text = 'experts that stay: 4, or by layer: 4,6,4'
    number.add_argument('--experts', default='', help=text)
    text = (
      'share of all experts that stays: the experts whose score is largest in '
      'proportion to the largest of their layer, at least K in each'
    )
    number.add_argument('--share', type=cli.SHARE, help=text)
    add('--batches', type=cli.POSITIVE, default=8, help='of the training split')
    add('--config', default='', help="config of other data than the run's")
    if verb == 'prune':
      text = (
        'the share of choices, the mean gate over all tokens, or the mean of '
        'gate times norm of output over the tokens of an expert'
      )
      add('--score', choices=[*SCORES], default='reap', help=text)
      continue
    parser.set_defaults(score='')
    text = (
      'what experts are compared by: mean outputs over all calibration tokens '
      '(HC-SMoE), aligned weights, or columns of the router'
    )
    kinds = [*merge.SIMILARITIES]
    add('--group_by', choices=kinds, default='outputs', help=text)
    text = (
      'clusters of average linkage, or the most used experts as cores that the '
      'others join (M-SMoE)'
    )
    kinds = [*merge.GROUPINGS]
    add('--grouping', choices=kinds, default='clusters', help=text)


def _run(options: argparse.Namespace, overrides: list[str]) -> str:
  check_free(pathlib.Path(options.output).expanduser())
  data_options = None
  if options.config:
    data_options = cli.said_options(
      DataOptions, options.config, overrides, 'data'
    )
  run = whole_run.read(
    options.folder, step=options.step, allow=options.allow_module
  )
  layers, counts = sparse_layers(run.model, run.variables), {}
  if options.experts:  # a bad number is refused before experts are measured
    counts = fewer.numbers(options.experts, layers)
    if options.score:
      fewer.check_groups(layers, counts)
  original = fewer.calibrated(run, options.batches, data_options)
  if not counts:
    score = SCORES[options.score or 'usage']
    scores = {n: score(usage) for n, usage in original.usage.items()}
    counts = fewer.numbers_by_share(options.share, scores, layers)
    if options.score:
      counts = fewer.in_groups(layers, counts)
  if options.score:
    new_layers = fewer.prune(original, counts, score=options.score)
  else:
    new_layers = merge.merge(
      original, counts, group_by=options.group_by, rule=options.grouping
    )
  model, variables = fewer.smaller(run, new_layers)
  folder = whole_run.write(
    run,
    options.output,
    variables['params'],
    model,
    router_state=variables.get(ROUTER_STATE),
  )
  lines = []
  for n, layer in new_layers.items():
    groups = ' '.join('+'.join(map(str, group)) for group in layer.groups)
    E, unused = layers[n].moe.num_experts, original.usage[n].unused
    lines.append(f'layer {n}: {len(layer.groups)} of {E} experts: {groups}')
    if unused:
      lines.append(f'layer {n}: no calibration token reached experts {unused}')
  old_bytes = bytes_in_memory(run.variables['params'])
  new_bytes = bytes_in_memory(variables['params'])
  recovery = [
    *cli.program('moe_jax.main').split(),
    f'--config={folder / CONFIG_PY}',
    f'--workdir={folder}-recovered',
    f'--config.init_from.workdir={folder}',
    f'--config.distill.teacher={run.folder}',
    '--config.distill.start=none',
  ]
  return '\n'.join(
    [
      *lines,
      f'bytes of parameters: {old_bytes:,} before, {new_bytes:,} now',
      f'written to {folder}; what was lost is recovered by distillation with '
      f'the original run as the teacher:\n{shlex.join(recovery)}',
    ]
  )
