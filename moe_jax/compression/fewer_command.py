"""The arguments and the report that the commands merge and prune share."""

import argparse
import math
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax import command_line, config_file, sections
from moe_jax.compression import whole_run
from moe_jax.compression.fewer import (
  SHRUNK,
  Calibrated,
  SmallerLayer,
  calibrated,
  check_columns,
  numbers,
  regrouped,
)
from moe_jax.compression.model_bytes import bytes_in_memory
from moe_jax.compression.usage import SCORES
from moe_jax.data import DataOptions
from moe_jax.errors import InputError
from moe_jax.models import ModelOptions
from moe_jax.models.expert_arrays import SparseLayer, sparse_layers
from moe_jax.models.router_state import COLLECTION
from moe_jax.option_checks import within
from moe_jax.runs import new_run

SHARE = within('(0, 1]')


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
    help='share of all experts that stays: the experts whose score is largest '
    'in proportion to the largest of their layer, at least K in each layer',
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
  data_options = None
  if options.config:
    section = config_file.config_of(options.config, overrides).data
    data_options = sections.read(DataOptions, section, 'data.')
  run = whole_run.read(
    options.source, step=options.step, allow=options.allow_module
  )
  counts = {}
  if options.experts:
    layers = sparse_layers(run.model, run.variables['params'])
    counts = numbers(options.experts, layers)
  if options.router != SHRUNK:
    check_columns(run, counts)
  original = calibrated(run, options.batches, data_options)
  if not counts:
    scores = {n: SCORES[score](usage) for n, usage in original.usage.items()}
    counts = numbers_by_share(options.share, scores, original.layers)
  return original, counts


def numbers_by_share(
  share: float,
  scores: Mapping[int, np.ndarray],
  layers: Mapping[int, SparseLayer],
) -> dict[int, int]:
  """The number of experts that stay in each layer, by one threshold for all.

  Scores are divided by the largest of their layer, as in M-SMoE; the experts of
  the highest scores stay, whatever their layer, and at least K of each.

  Args:
    share: The share of all experts that stay, in (0, 1].
    scores: The score of each expert, by layer.
    layers: The sparse layers.
  """
  if not SHARE.holds(share):
    raise InputError(f'share={share} {SHARE.rule}')
  relative = {n: s / max(s.max(), 1e-30) for n, s in scores.items()}
  least = {n: layer.moe.num_selected for n, layer in layers.items()}
  ranked = {n: np.sort(s)[::-1] for n, s in relative.items()}
  candidates = sorted(
    ((s, -n) for n, x in ranked.items() for s in x[least[n] :]), reverse=True
  )
  total = sum(len(s) for s in scores.values())
  num_extra = max(math.floor(share * total + 0.5) - sum(least.values()), 0)
  counts = dict(least)
  for _, negative in candidates[:num_extra]:
    counts[-negative] += 1
  return counts


def write(
  original: Calibrated,
  output: str,
  model: ModelOptions,
  variables: Mapping[str, Any],
) -> pathlib.Path:
  """Writes the smaller model as a new run; see `whole_run.write`."""
  state = variables.get(COLLECTION)
  return whole_run.write(
    original.run, output, variables['params'], model, router_state=state
  )


def report_lines(
  original: Calibrated,
  params: Mapping[str, Any],
  new_layers: Mapping[int, SmallerLayer],
  router: str,
) -> list[str]:
  """Lines on experts and bytes before and after, and on unused experts.

  Args:
    original: The run with the statistics of its experts.
    params: The parameters of the smaller model.
    new_layers: Each sparse layer with the experts that stay, by number.
    router: See `smaller`.
  """
  lines, counts = [], []
  for n, new_layer in new_layers.items():
    counts.append(f'layer {n}: {new_layer.num_experts} of {len(new_layer.row)}')
  lines.append('experts left: ' + ', '.join(counts))
  for n, usage in original.usage.items():
    if usage.unused:
      lines.append(
        f'layer {n}: no calibration token reached experts {usage.unused}'
      )
  for n, new_layer in new_layers.items():
    layer = original.layers[n]
    if router == SHRUNK and (moved := regrouped(layer, new_layer)):
      lines.append(
        f'layer {n}: WARNING: the groups of experts are formed anew of the '
        f'columns that are left, by which experts {moved} are in another group '
        'than before, and tokens choose otherwise'
      )
  old_bytes = bytes_in_memory(original.run.variables['params'])
  new_bytes = bytes_in_memory(params)
  lines.append(f'bytes of parameters: {old_bytes:,} before, {new_bytes:,} now')
  return lines


def closing_lines(folder: pathlib.Path, original: Calibrated) -> str:
  """The last lines of a command, with the command that may follow."""
  command = [
    *(*command_line.program('moe_jax.compression').split(), 'distill'),
    f'--teacher={original.run.folder}',
    f'--config={folder / new_run.CONFIG_PY}',
    f'--workdir={folder}-recovered',
    f'--config.init_from.workdir={folder}',
    '--config.distill.start=none',
  ]
  return (
    f'written to {folder}; what was lost is recovered by distillation with the '
    f'original run as the teacher:\n{shlex.join(command)}'
  )
