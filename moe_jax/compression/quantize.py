"""Quantises a run: its experts in codes of few bits.

    python -m moe_jax.compression quantize --run=runs/tiny --output=runs/int4 \
      --format=int4 --method=gptq --batches=16

Layers are rounded in turn. The whole model is run with the kernels as rounded
so far, so that the outputs of rounded layers are the inputs of the next. The
new folder is evaluated, generated from and exported like any run's, but it is
not trained.
"""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import cli
from moe_jax.compression import calibration, gptq, whole_run
from moe_jax.compression.gptq import Outcome
from moe_jax.config import unknown
from moe_jax.data.cache_folders import check_free
from moe_jax.errors import InputError
from moe_jax.kernels import kernel_format
from moe_jax.kernels.kernel_format import FORMATS, KernelFormat
from moe_jax.layers.experts import SCOPE
from moe_jax.layers.ffn import FfnLayer
from moe_jax.models import ModelOptions, code_trees
from moe_jax.models.description import Path
from moe_jax.models.trees import flatten, unflatten
from moe_jax.training.trained import Loaded

METHODS = ('gptq', 'rtn')
BATCHES = 16
# The number of experts that are rounded together, as in QMoE.
_GROUP_SIZE = 16
_Arrays = dict[str, np.ndarray]


def quantize(
  workdir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  format: KernelFormat,
  *,
  step: int | None = None,
  method: str = 'gptq',
  num_batches: int = BATCHES,
  allow: Iterable[str] = (),
  message: Callable[[str], None] = print,
) -> dict[str, float]:
  """Makes a run whose experts' kernels are quantised to few bits.

  Args:
    workdir: The folder of a run of a Transformer, trained or imported.
    output: A folder that is new or empty.
    format: The format of the quantised kernels.
    step: The step of the checkpoint; None is the newest good one.
    method: 'gptq', or 'rtn', which rounds each weight to the nearest value and
      reads no data.
    num_batches: The number of batches of the run's training data, for 'gptq'.
    allow: Modules whose classes, named in the run's folder, may be imported.
    message: The function that prints a line for each layer.

  Returns:
    Numbers about all kernels: 'rtn error' and 'gptq error', the mean over
    layers of the squared change of outputs over the squared outputs ('rtn'
    takes weights in place of outputs); 'zeros', the share of weights that are
    0; 'code bits', the bits of codes for each weight; 'metadata bits', those of
    all else that is stored, such as scales, offsets and what fills up kernels
    of fewer codes; 'bytes' and 'bytes before', of all parameters in memory.

  Raises:
    ValueError: The model is quantised already, or has no experts in blocks or
      experts that are no feed-forwards; or `output` is not empty.
  """
  if method not in METHODS:
    raise unknown('method', method, METHODS)
  run = whole_run.read(workdir, step=step, allow=allow)
  output = pathlib.Path(output).expanduser()
  check_free(output)
  options, places = _coded(run, format)
  batches = []
  if method == 'gptq':
    batches = calibration.batches(run, num_batches)
  old_params = run.variables['params']
  params = jax.tree.map(np.array, old_params)
  # Changing `arrays` in place changes `params`.
  arrays = flatten(params)
  stored: dict[Path, list[_Arrays]] = {}
  reports = []
  for layer, (path, index) in places.items():
    p = {
      kernel[-1]: array[index]
      for kernel, array in arrays.items()
      if kernel[:-1] == path
    }
    outcomes, without_tokens = _round(run, params, layer, p, format, batches)
    kernels = {n: format.store(x.codes, x.grid) for n, x in outcomes.items()}
    for name, outcome in outcomes.items():
      stacked = arrays[*path, name]
      stacked[index] = np.asarray(outcome.values).astype(stacked.dtype)
      stored.setdefault((*path, name), []).append(kernels[name])
    numbers, line = report(outcomes, kernels, without_tokens)
    message(f'layer {layer}: {line}')
    reports.append(numbers)
  if format.name == kernel_format.TERNARY:
    kernels = (x for layers in stored.values() for x in layers)
    num_codes = kernel_format.fill_up(kernels)
    format = dataclasses.replace(format, num_codes=num_codes)
    options = code_trees.with_formats(options, format)
  new_params = flatten(old_params)
  num_bytes = 0
  for path, layers in stored.items():
    del new_params[path]
    for name in layers[0]:
      array = jnp.asarray(np.stack([kernel[name] for kernel in layers]))
      new_params[*path, name] = array
      num_bytes += array.nbytes
  new_params = unflatten(new_params)
  whole_run.write(run, output, new_params, options)
  total = {key: sum(numbers[key] for numbers in reports) for key in reports[0]}
  return {
    'rtn error': total['rtn error'] / len(reports),
    'gptq error': total['gptq error'] / len(reports),
    'zeros': total['zeros'] / total['weights'],
    'code bits': total['code bits'] / total['weights'],
    'metadata bits': (8 * num_bytes - total['code bits']) / total['weights'],
    'bytes': whole_run.bytes_in_memory(new_params),
    'bytes before': whole_run.bytes_in_memory(old_params),
  }


def _coded(
  run: Loaded, format: KernelFormat
) -> tuple[ModelOptions, dict[int, tuple[Path, int]]]:
  """The options of the new model, and where the experts of each layer are.

  The place of a layer's experts is the path of their parameters, in which
  layers are stacked, and the index of the layer among the stacked layers.

  Raises:
    ValueError: The model is quantised already, or has no experts.
  """
  model = run.options.model
  if code_trees.has_codes(model):
    raise InputError(
      f'{run.folder} has kernels in codes already; quantise the run that it '
      'was made of'
    )
  options = code_trees.with_formats(model, format)
  places = {
    number: ((*layer.path, 'moe', SCOPE), cast(int, layer.index))
    for number, layer in enumerate(run.model.stacks.layers)
    if layer.moe is not None
  }
  if not places:
    raise InputError(f'{run.folder} has no experts to quantise')
  return options, places


def _round(
  run: Loaded,
  params: Any,
  layer: int,
  p: dict[str, np.ndarray],
  format: KernelFormat,
  batches: Sequence[dict[str, Any]],
) -> tuple[dict[str, Outcome], list[int]]:
  """Rounds the kernels of a layer by GPTQ, or without batches to the nearest.

  Args:
    run: The run, with the kernels before rounding.
    params: All parameters, with the kernels of earlier layers rounded; from
      these the inputs of the layer are computed.
    layer: The index of the layer.
    p: The parameters of the layer's experts, [E, ...], by the last part of
      their names.
    format: The format of the quantised kernels.
    batches: Batches of calibration data; if empty, the model is not run.

  Returns:
    The outcome of each kernel by its name, and the indices of the experts that
    no counted token reaches, for which GPTQ rounds to the nearest value.
  """
  moe = run.model.stacks.moe_of(layer)
  (shared, *_) = (stack.block.shared for stack in run.model.stacks.blocks)
  expert = FfnLayer(moe.expert.twin(1).ffn, shared)
  if not batches:
    names = (*expert.first_kernels, 'w_out')
    return {name: gptq.to_nearest(p[name], format) for name in names}, []
  model, variables = run.model, {**run.variables, 'params': params}
  prefix, tokenizer = model.stacks.sequence_of(layer), run.options.tokenizer
  tokens = calibration.ExpertTokens(
    [calibration.capture(model, variables, batch)[layer] for batch in batches],
    [calibration.counted(batch, prefix, tokenizer) for batch in batches],
  )
  groups = []
  for first in range(0, tokens.num_experts, _GROUP_SIZE):
    group = slice(first, first + _GROUP_SIZE)
    p_group = {name: x[group] for name, x in p.items()}
    rounded = gptq.feed_forwards(expert, p_group, tokens.rows(group), format)
    groups.append(jax.device_get(rounded))
  outcomes = jax.tree.map(lambda *leaves: np.concatenate(leaves), *groups)
  return outcomes, tokens.without_tokens


def report(
  outcomes: Mapping[str, Outcome],
  stored: Mapping[str, _Arrays],
  without_tokens: Sequence[int],
) -> tuple[dict[str, float], str]:
  """Numbers about the kernels of a layer, and a line that prints them.

  'rtn error' and 'gptq error' are the squared changes of the kernels' outputs
  divided by the squared outputs; 'zeros', 'weights' and 'code bits' are counts
  over all kernels.
  The line names experts that GPTQ rounds to the nearest value: it takes their
  Hessian H for the identity, as no counted token reaches them, their inputs are
  zero, or the factorisation fails.

  Args:
    outcomes: The outcome of each kernel, by its name.
    stored: The arrays that store each kernel, by its name.
    without_tokens: The indices of the experts that no counted token reaches.
  """
  kernels = outcomes.values()
  total = sum(float(x.total.sum()) for x in kernels) or 1.0
  code_bits = metadata_bits = 0
  for arrays in stored.values():
    codes = arrays['codes'].nbytes
    metadata_bits += 8 * (sum(x.nbytes for x in arrays.values()) - codes)
    if 'offsets' in arrays:  # what fills up shorter kernels is no code
      code_bits += 16 * int(arrays['offsets'][..., -1].sum())
    else:
      code_bits += 8 * codes
  weights = sum(x.codes.size for x in kernels)
  zeros = sum(int((x.values == 0).sum()) for x in kernels)
  numbers = {
    'rtn error': sum(float(x.rtn.sum()) for x in kernels) / total,
    'gptq error': sum(float(x.gptq.sum()) for x in kernels) / total,
    'weights': weights,
    'zeros': zeros,
    'code bits': code_bits,
  }
  line = (
    f'error of RTN {numbers["rtn error"]:.3g}, of GPTQ '
    f'{numbers["gptq error"]:.3g}; zeros {100 * zeros / weights:.1f} %; bits a '
    f'weight {code_bits / weights:.2f} of codes and '
    f'{metadata_bits / weights:.2f} of metadata'
  )
  plain = np.any([x.plain for x in kernels], axis=0)
  not_factored = {*np.flatnonzero(plain).tolist()} - {*without_tokens}
  if without_tokens:
    line += f'; H = I for experts {[*without_tokens]} (no tokens)'
  if not_factored:
    line += f'; H = I for experts {sorted(not_factored)} (no factor)'
  return numbers, line


def add(commands: Any) -> None:
  """Adds the command `quantize` to the commands of a parser."""
  text = 'stores experts in codes of few bits'
  command = whole_run.command(commands, 'quantize', _run, text, __doc__)
  add = command.add_argument
  add('--format', required=True, choices=FORMATS)
  add('--method', default='gptq', choices=METHODS, help='rtn reads no data')
  add(
    '--batches',
    type=cli.POSITIVE,
    help=f'of the training split, for gptq ({BATCHES})',
  )


def _run(options: argparse.Namespace, _: list[str]) -> str:
  if options.method == 'rtn' and options.batches:
    raise InputError(
      f'--batches={options.batches} has no effect with --method=rtn, which '
      'reads no data; leave it out'
    )
  numbers = quantize(
    options.folder,
    options.output,
    KernelFormat(options.format),
    step=options.step,
    method=options.method,
    num_batches=options.batches or BATCHES,
    allow=options.allow_module,
  )
  disk = whole_run.bytes_on_disk(options.output)
  return (
    f'{options.output}: {numbers["bytes"]:,.0f} bytes of parameters in memory, '
    f'of {numbers["bytes before"]:,.0f} before; {disk:,} bytes on disk\n'
    f'quantised kernels: {numbers["code bits"]:.2f} bits a weight of codes and '
    f'{numbers["metadata bits"]:.2f} of metadata, zeros '
    f'{100 * numbers["zeros"]:.1f} %'
  )
