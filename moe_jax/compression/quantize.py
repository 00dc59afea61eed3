"""Quantises a run: its experts, or all of its kernels, in codes of few bits.

The new folder is evaluated, generated from and exported like any run's, but it
is not trained. Not here: the rounding of kernels
(`quantize_kernels.py`), the order of the kernels (`quantize_layers.py`), and
the command line (`quantize_command.py`).
"""

import dataclasses
import functools
import hashlib
import operator
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.compression import (
  calibration,
  model_bytes,
  quantize_work,
  stored,
  whole_run,
)
from moe_jax.compression import quantize_report as report
from moe_jax.compression.grids import Rounded
from moe_jax.compression.quantize_layers import Layers, Spot
from moe_jax.compression.quantize_report import Report
from moe_jax.compression.quantize_work import Work
from moe_jax.compression.whole_run import WholeRun
from moe_jax.data import DataOptions
from moe_jax.errors import InputError
from moe_jax.layers.kernel_format import BITS, FORMATS, TERNARY, KernelFormat
from moe_jax.models import ModelOptions, code_trees
from moe_jax.models.code_trees import Coded
from moe_jax.models.flat_trees import Path
from moe_jax.models.transformer_options import TransformerOptions
from moe_jax.options import unknown
from moe_jax.runs import trained
from moe_jax.runs.workdir import CONFIG

METHODS = ('gptq', 'rtn')
KERNELS = ('experts', 'all')
BATCHES = 16


def quantize(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  format: KernelFormat,
  *,
  step: int | None = None,
  method: str = 'gptq',
  kernels: str = 'experts',
  num_batches: int = BATCHES,
  data: DataOptions | None = None,
  allow: Iterable[str] = (),
  message: Callable[[str], None] = print,
) -> dict[str, float]:
  """Makes a run whose kernels are in codes of few bits.

  A call that was killed goes on after the last layer that was done. If two
  calls write one folder at the same time, the second waits for the first.

  Args:
    workdir: The folder of a run of a Transformer, trained or imported.
    output: A folder that is new or empty.
    format: The format of the codes.
    step: The step of the checkpoint; None is the newest good one.
    method: 'gptq', or 'rtn', which rounds each weight to the nearest value and
      reads no data.
    kernels: 'experts', or 'all' for those of attention and of dense
      feed-forward layers too.
    num_batches: The number of batches of calibration data, for 'gptq'.
    data: The options of the calibration data, for 'gptq'; None takes those of
      the run. The split is always the one that is trained on.
    allow: Modules whose classes, named in the run's folder, may be imported.
    message: The function that prints a line for each layer.

  Returns:
    Numbers about all kernels: 'rtn error' and 'gptq error', the mean over
    kernels of the squared change of outputs over the squared outputs; 'zeros',
    the share of weights that are 0; 'code bits', the bits of codes for each
    weight; 'metadata bits', those of all else that is stored, such as scales,
    offsets and what fills up kernels of fewer codes; 'bytes' and 'bytes
    before', of all parameters in memory.

  Raises:
    ValueError: The run cannot be quantised so, or a folder is not free.
  """
  _check(format, method, kernels)
  run = whole_run.read(workdir, step=step, allow=allow)
  output = pathlib.Path(output).expanduser()
  quantize_work.check_free(output)
  options, coded = _coded_options(run, format, kernels)
  batches = []
  if method == 'gptq':
    _check_calibrated(options, kernels)
    batches = calibration.batches(run, num_batches, data)
  settings = {
    'run': str(run.folder.resolve()),
    'step': run.step,
    'checkpoint': trained.checkpoint_digest(run.folder, run.step),
    'format': dataclasses.asdict(format),
    'method': method,
    'kernels': kernels,
    'batches': _digest(batches),
  }
  layers = Layers(run, coded, batches)
  with quantize_work.opened(output, settings, layers.spots) as work:
    rounded, reports = _all_layers(layers, work, message)
    params, options = _assembled(run, options, coded, rounded)
    if not _is_written(output, params, allow):
      whole_run.write(run, output, params, options, packed=True)
  stored_bytes = sum(
    model_bytes.bytes_in_memory(
      functools.reduce(operator.getitem, path, params)
    )
    for path in coded
  )
  return report.numbers_of(reports, stored_bytes) | {
    'bytes': model_bytes.bytes_in_memory(params),
    'bytes before': model_bytes.bytes_in_memory(run.variables['params']),
  }


def _check(format: KernelFormat, method: str, kernels: str) -> None:
  """Raises ValueError for values that are unknown or do not go together."""
  for argument, name, names in (
    ('format', format.name, FORMATS),
    ('method', method, METHODS),
    ('kernels', kernels, KERNELS),
  ):
    if name not in names:
      raise unknown(argument, name, names)
  if kernels == 'all' and format.name == TERNARY:
    raise InputError(
      "format 'ternary' with kernels='all': the codes of less than a bit are "
      f'for experts; all kernels can be in {list(BITS)}'
    )


def _check_calibrated(options: ModelOptions, kernels: str) -> None:
  """Raises ValueError for kernels whose inputs are not captured."""
  halves = options.halves if isinstance(options, TransformerOptions) else ()
  for attention in (half.attention for half in halves):
    if kernels == 'all' and not attention.captures_inputs:
      raise InputError(
        f"kernels='all' with {type(attention).__name__} and method='gptq': "
        "inputs of its kernels are not captured; use method='rtn' or "
        "kernels='experts'"
      )


def _coded_options(
  run: WholeRun, format: KernelFormat, kernels: str
) -> tuple[ModelOptions, dict[Path, Coded]]:
  """The options of the new model, and the kernels that get codes.

  Raises:
    ValueError: The model has codes already, or no such kernels.
  """
  model = run.options.model
  if code_trees.has_codes(model):
    raise InputError(
      f'{run.folder} has kernels in codes already; quantise the run that it '
      'was made of'
    )
  other_format = format if kernels == 'all' else KernelFormat()
  options = code_trees.with_formats(model, format, other_format)
  if coded := code_trees.coded_kernels(options):
    return options, coded
  raise InputError(f"{run.folder} has no experts; use kernels='all'")


def _digest(batches: Sequence[Mapping[str, np.ndarray]]) -> str:
  """The sha256 of all arrays of the calibration data."""
  digest = hashlib.sha256()
  for batch in batches:
    for name in sorted(batch):
      digest.update(np.ascontiguousarray(batch[name]).tobytes())
  return digest.hexdigest()


def _all_layers(
  layers: Layers, work: Work, message: Callable[[str], None]
) -> tuple[dict[Spot, Rounded], dict[int, Report]]:
  """Rounds all layers that are not done yet; returns their kernels."""
  rounded: dict[Spot, Rounded] = {}
  reports = {}
  for layer, spots in layers.spots.items():
    layer_spots = [spot for x in spots.values() for spot in x.values()]
    saved = work.load(layer, layer_spots, layers.format_of)
    if saved is None:
      outcomes = layers.quantize(layer)
      kernels = {spot: x.rounded for spot, x in outcomes.items()}
      layer_report = report.report_of(
        outcomes,
        layers.format_of(layer_spots[0]),
        by_data=layers.by_data,
        without_tokens=layers.without_tokens.get(layer, ()),
      )
      work.save(layer, kernels, layer_report)
    else:
      kernels, layer_report = saved
      for spot, kernel in kernels.items():
        layers.replace(spot, kernel)
    note = ' (done before)' if saved else ''
    message(f'layer {layer}: {layer_report.text()}{note}')
    rounded |= kernels
    reports[layer] = layer_report
  return rounded, reports


def _assembled(
  run: WholeRun,
  options: ModelOptions,
  coded: Mapping[Path, Coded],
  rounded: Mapping[Spot, Rounded],
) -> tuple[dict[str, Any], ModelOptions]:
  """The parameters of the new model, and its options with all sizes."""
  by_path: dict[Path, list[Rounded]] = {path: [] for path in coded}
  for spot in sorted(rounded, key=lambda spot: spot.index):
    by_path[spot.path].append(rounded[spot])
  stacked = [_stacked(x, coded[path].matrix) for path, x in by_path.items()]
  format = next(iter(coded.values())).format
  arrays, format = stored.store(stacked, format)
  params = dict(run.variables['params'])
  for path, kernel_arrays in zip(by_path, arrays, strict=True):
    params = _set_at(params, path, kernel_arrays)
  if format.name == TERNARY:
    options = code_trees.with_formats(options, format)
  return params, options


def _stacked(kernels: Sequence[Rounded], matrix: tuple[int, ...]) -> Rounded:
  """The kernels of the layers of one parameter, as one [*E, I, O]."""

  def stack(*leaves):
    stacked = np.stack([np.asarray(leaf) for leaf in leaves])
    return stacked.reshape(*matrix[:-2], *stacked.shape[-2:])

  return jax.tree.map(stack, *kernels)


def _set_at(tree: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
  """The tree with another value at a path."""
  name, rest = path[0], path[1:]
  return {**tree, name: _set_at(tree[name], rest, value) if rest else value}


def _is_written(
  output: pathlib.Path, params: Mapping[str, Any], allow: Iterable[str]
) -> bool:
  """Whether a folder holds a run of these parameters already."""
  if not (output / CONFIG).exists():
    return False
  stored_params = whole_run.read(output, allow=allow).variables['params']
  if jax.tree.structure(stored_params) != jax.tree.structure(params):
    return False
  return jax.tree.all(jax.tree.map(np.array_equal, stored_params, params))
