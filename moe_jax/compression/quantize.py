"""Quantises a run: its experts in codes of few bits.

The new folder is evaluated, generated from and exported like any run's, but it
is not trained.
"""

import functools
import operator
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.compression import calibration, stored, whole_run
from moe_jax.compression import quantize_report as report
from moe_jax.compression.grids import Rounded
from moe_jax.compression.quantize_layers import Layers, Spot
from moe_jax.compression.quantize_report import Report
from moe_jax.compression.whole_run import WholeRun
from moe_jax.data import DataOptions
from moe_jax.errors import InputError
from moe_jax.layers.kernel_format import TERNARY, KernelFormat
from moe_jax.models import ModelOptions, code_trees
from moe_jax.models.code_trees import Coded
from moe_jax.models.flat_trees import Path
from moe_jax.options import unknown
from moe_jax.runs import new_run

METHODS = ('gptq', 'rtn')
BATCHES = 16


def quantize(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  format: KernelFormat,
  *,
  step: int | None = None,
  method: str = 'gptq',
  num_batches: int = BATCHES,
  data: DataOptions | None = None,
  allow: Iterable[str] = (),
  message: Callable[[str], None] = print,
) -> dict[str, float]:
  """Makes a run whose experts are in codes of few bits.

  Args:
    workdir: The folder of a run of a Transformer, trained or imported.
    output: A folder that is new or empty.
    format: The format of the codes.
    step: The step of the checkpoint; None is the newest good one.
    method: 'gptq', or 'rtn', which rounds each weight to the nearest value and
      reads no data.
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
  if method not in METHODS:
    raise unknown('method', method, METHODS)
  run = whole_run.read(workdir, step=step, allow=allow)
  output = pathlib.Path(output).expanduser()
  new_run.check_free(output)
  options, coded = _coded_options(run, format)
  batches = []
  if method == 'gptq':
    batches = calibration.batches(run, num_batches, data)
  rounded, reports = _all_layers(Layers(run, coded, batches), message)
  params, options = _assembled(run, options, coded, rounded)
  whole_run.write(run, output, params, options)
  stored_bytes = sum(
    whole_run.bytes_in_memory(functools.reduce(operator.getitem, path, params))
    for path in coded
  )
  return report.numbers_of(reports, stored_bytes) | {
    'bytes': whole_run.bytes_in_memory(params),
    'bytes before': whole_run.bytes_in_memory(run.variables['params']),
  }


def _coded_options(
  run: WholeRun, format: KernelFormat
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
  options = code_trees.with_formats(model, format)
  if coded := code_trees.coded_kernels(options):
    return options, coded
  raise InputError(f'{run.folder} has no experts to quantise')


def _all_layers(
  layers: Layers, message: Callable[[str], None]
) -> tuple[dict[Spot, Rounded], list[Report]]:
  """Rounds all layers in turn; returns their kernels and reports."""
  rounded: dict[Spot, Rounded] = {}
  reports = []
  for layer in layers.spots:
    outcomes = layers.quantize(layer)
    layer_report = report.report_of(
      outcomes,
      layers.format_of(layer),
      by_data=layers.by_data,
      without_tokens=layers.without_tokens.get(layer, ()),
    )
    message(f'layer {layer}: {layer_report.text()}')
    rounded |= {spot: x.rounded for spot, x in outcomes.items()}
    reports.append(layer_report)
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
  stacked = [_stacked(x) for x in by_path.values()]
  format = next(iter(coded.values())).format
  arrays, format = stored.store(stacked, format)
  params = dict(run.variables['params'])
  for path, kernel_arrays in zip(by_path, arrays, strict=True):
    on_device = jax.tree.map(jnp.asarray, kernel_arrays)
    params = _set_at(params, path, on_device)
  if format.name == TERNARY:
    options = code_trees.with_formats(options, format)
  return params, options


def _stacked(kernels: Sequence[Rounded]) -> Rounded:
  """The kernels of the layers of one parameter, as one [layers, E, I, O]."""
  return jax.tree.map(
    lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *kernels
  )


def _set_at(tree: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
  """The tree with another value at a path."""
  name, rest = path[0], path[1:]
  return {**tree, name: _set_at(tree[name], rest, value) if rest else value}
