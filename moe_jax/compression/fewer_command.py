"""The arguments and the report that the commands merge and prune share.

Not here: what the commands do (`merge.py`, `prune.py`).
"""

import argparse
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from moe_jax import command_line, config_file, sections
from moe_jax.compression import whole_run
from moe_jax.compression.fewer import (
  SHARE,
  SHRUNK,
  Calibrated,
  Fewer,
  calibrated,
  check_columns,
  numbers,
  numbers_by_share,
)
from moe_jax.compression.model_bytes import bytes_in_memory
from moe_jax.compression.usage import SCORES
from moe_jax.data import DataOptions
from moe_jax.models.expert_arrays import sparse_layers
from moe_jax.runs import new_run


def add_arguments(
  parser: argparse.ArgumentParser, routers: tuple[str, ...], router: str
) -> None:
  """Adds the arguments that both commands have."""
  add = parser.add_argument
  add('--run', required=True, dest='source', help='folder of the run')
  add('--output', required=True, help='folder of the new run')
  add('--step', type=command_line.NOT_NEGATIVE, help='checkpoint; else newest')
  number = parser.add_mutually_exclusive_group(required=True)
  number.add_argument(
    '--experts', default='', help='experts that stay: 4, or by layer: 4,6,4'
  )
  number.add_argument(
    '--share',
    type=command_line.number(float, SHARE),
    help='share of all experts that stay, those whose score is largest in '
    "proportion to their layer's largest, and at least K in each layer",
  )
  add('--router', choices=routers, default=router)
  add('--batches', type=command_line.POSITIVE, default=8)
  add(
    '--config',
    default='',
    help="config of the data, by path or name; else the run's",
  )


def read(
  options: argparse.Namespace, overrides: list[str], score: str
) -> tuple[Calibrated, dict[int, int]]:
  """The run that a command names, and how many experts stay in each layer.

  Args:
    options: The options of the command; the folder `output` has to be free.
    overrides: Overrides of the config of the data.
    score: The score by which a share of all experts is chosen, of `SCORES`.
  """
  new_run.check_free(pathlib.Path(options.output).expanduser())
  data = None
  if options.config:
    section = config_file.config_of(options.config, overrides).data
    data = sections.read(DataOptions, section, 'data.')
  run = whole_run.read(
    options.source, step=options.step, allow=options.allow_module
  )
  counts = {}
  if options.experts:
    layers = sparse_layers(run.model, run.variables['params'])
    counts = numbers(options.experts, layers)
  if options.router != SHRUNK:
    check_columns(run, counts)
  before = calibrated(run, options.batches, data)
  if not counts:
    scores = {n: SCORES[score](usage) for n, usage in before.usage.items()}
    counts = numbers_by_share(options.share, scores, before.layers)
  return before, counts


def described(
  before: Calibrated, params: Mapping[str, Any], left: Mapping[int, Fewer]
) -> list[str]:
  """Lines on experts and bytes before and after, and on unused experts.

  Args:
    before: The run, measured.
    params: The parameters of the smaller model.
    left: Each sparse layer with the experts that stay, by number.
  """
  lines, parts = [], []
  for n, fewer in left.items():
    parts.append(f'layer {n}: {fewer.num_experts} of {len(fewer.row)}')
  lines.append('experts left: ' + ', '.join(parts))
  for n, usage in before.usage.items():
    if usage.unused:
      lines.append(
        f'layer {n}: no calibration token reached experts {usage.unused}'
      )
  old = bytes_in_memory(before.run.variables['params'])
  new = bytes_in_memory(params)
  lines.append(f'bytes of parameters: {old:,} before, {new:,} now')
  return lines


def written_to(folder: pathlib.Path, before: Calibrated) -> str:
  """The last lines of a command, with the one that may follow."""
  words = [
    *(*command_line.program('moe_jax.compression').split(), 'distill'),
    f'--teacher={before.run.folder}',
    f'--config={folder / new_run.CONFIG_PY}',
    f'--workdir={folder}-recovered',
    f'--config.init_from.workdir={folder}',
    '--config.distill.start=none',
  ]
  return (
    f'written to {folder}; what was lost is recovered by distillation with the '
    f'original run as the teacher:\n{shlex.join(words)}'
  )
