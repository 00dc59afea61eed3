"""Computes and keeps a teacher's largest logits for the batches of a run.

    python -m moe_jax.compression keep_logits --teacher=runs/tiny \
      --config=moe_jax:tiny_switch --output=logits --batches=1000 --top=32

The manifest is written last: what a killed command left is no folder of logits
yet, and the same command goes on with it.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from moe_jax import command_line, config_file, data, sections
from moe_jax.compression import whole_run
from moe_jax.compression.soft_labels import IDS, LOG_PROBS
from moe_jax.compression.teacher_logits import (
  FORMAT,
  MANIFEST,
  TARGETS,
  About,
  StoredLogits,
  digest_of,
  load,
  read,
  row_digests,
)
from moe_jax.errors import InputError, writing
from moe_jax.models import Model, code_trees
from moe_jax.option_checks import unknown_text
from moe_jax.runs import trained
from moe_jax.runs import workdir as workdir_lib
from moe_jax.shapes import Array, Float32, Int32

DTYPES = ('float16', 'float32')


def largest(
  model: Model, variables: Any, batch: Mapping[str, Array], top: int
) -> tuple[
  Int32[Array, 'B T top'], Float32[Array, 'B T top'], Float32[Array, 'B T']
]:
  """Ids and log-probabilities of the likeliest tokens, and what they leave out.

  Args:
    model: The teacher.
    variables: Its variables.
    batch: A batch.
    top: The number of tokens.

  Returns:
    The ids and the logarithms of their probabilities, largest first, and the
    probability of all other tokens, 0 where the loss weight is 0.
  """
  logits, _ = model.apply(variables, **model.inputs(batch))
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  top_log_probs, ids = jax.lax.top_k(log_probs, top)
  left_out = jnp.maximum(1.0 - jnp.exp(top_log_probs).sum(-1), 0.0)
  left_out = jnp.where(batch['loss_weights'] != 0, left_out, 0.0)
  return ids.astype(jnp.int32), top_log_probs, left_out


def write(
  teacher: str | os.PathLike[str],
  output: str | os.PathLike[str],
  options: data.DataOptions,
  *,
  seed: int,
  batch_size: int,
  batches: int,
  top: int,
  dtype: str = DTYPES[0],
  step: int | None = None,
  each: int = 16,
  allow: Iterable[str] = (),
) -> StoredLogits:
  """Writes a teacher's largest logits for batches of a run that is to come.

  One process computes them, on its first device. Files that are there already
  stay if they are of the same teacher, data and sizes.

  Args:
    teacher: The folder of the teacher.
    output: The folder to write, new or left by the same command.
    options: The options of the run's data.
    seed: The run's seed.
    batch_size: The number of rows in a batch of the run.
    batches: The number of batches, from that of step 0 on.
    top: The number of logits to keep for each token, at most V.
    dtype: The type in which logits are stored.
    step: The step of the teacher's checkpoint; None is the newest good one.
    each: The number of batches in each file.
    allow: Modules whose classes, named in the teacher's folder, may be
      imported.

  Raises:
    ValueError: The teacher's tokens or tasks are not those of the data, a
      number is out of range, or `output` has something else.
    CheckpointError: No checkpoint is good.
  """
  run = whole_run.read(teacher, step=step, allow=allow)
  code_trees.check_plain(run.options.model, run.folder)
  for problem in run.options.task_problems(options):
    raise InputError(f'{run.folder} does not fit the data: {problem}')
  dataset = data.load(options)
  _check(run, dataset, top, dtype)
  rows = dataset.splits['train']
  stream = data.batch_dataset(rows, batch_size=batch_size, seed=seed)
  about = About(
    teacher=os.fspath(teacher),
    step=run.step,
    sha256=trained.checkpoint_digest(run.folder, run.step),
    data_digest=dataset.digest,
    seed=seed,
    batch_size=batch_size,
    length=rows.take(np.arange(1))['targets'].shape[1],
    vocab_size=run.model.vocab_size,
    top=top,
    dtype=dtype,
    batches=batches,
    each=each,
  )
  folder = pathlib.Path(output).expanduser()
  _check_folder(folder, about)
  compute = jax.jit(functools.partial(largest, run.model, top=top))
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in about.files():
      if not _is_whole(folder / name, about):
        chunk = (stream[number] for number in numbers)
        parts = _arrays(about, chunk, functools.partial(compute, run.variables))
        _save(folder / name, parts, about)
    _write_manifest(folder, about)
  return read(folder)


def _check(
  run: whole_run.WholeRun, dataset: data.Dataset, top: int, dtype: str
) -> None:
  """Raises ValueError for a teacher or a number that does not fit."""
  for problem in run.options.token_problems(dataset.tokenizer):
    raise InputError(f'{run.folder} does not fit the data: {problem}')
  if not 1 <= top <= run.model.vocab_size:
    raise InputError(f'top={top} not in [1, vocab_size={run.model.vocab_size}]')
  if dtype not in DTYPES:
    raise InputError(unknown_text('type of kept logits', dtype, DTYPES))


def _check_folder(folder: pathlib.Path, about: About) -> None:
  """Raises ValueError where a folder holds something else."""
  if folder.exists() and not folder.is_dir():
    raise InputError(f'{folder} is a file; it must be a folder')
  files = {path.name for path in folder.iterdir()} if folder.exists() else set()
  names = {name for name, _ in about.files()}
  if extra := files - names - {MANIFEST} - {f'{n}.tmp' for n in names}:
    raise InputError(
      f'{folder} has {min(extra)!r}, which these logits have not; give a new '
      'folder'
    )
  if MANIFEST in files and (stored_about := read(folder).about) != about:
    differences = [
      f'{key}: {getattr(stored_about, key)!r} -> {value!r}'
      for key, value in dataclasses.asdict(about).items()
      if getattr(stored_about, key) != value
    ]
    raise InputError(f'{folder} holds other logits: {"; ".join(differences)}')


def _arrays(about: About, batches, compute) -> dict[str, Any]:
  """The arrays of a file, for consecutive batches."""
  fits_uint16 = about.vocab_size <= 2**16
  columns: dict[str, list] = {
    name: [] for name in (IDS, LOG_PROBS, TARGETS, 'left_out', 'weight')
  }
  for batch in batches:
    ids, log_probs, left_out = jax.device_get(compute(batch))
    columns[IDS].append(ids.astype(np.uint16 if fits_uint16 else np.int32))
    columns[LOG_PROBS].append(log_probs.astype(about.dtype))
    columns[TARGETS].append(row_digests(batch['targets']))
    columns['left_out'].append(left_out.astype(np.float32))
    columns['weight'].append(np.sum(np.asarray(batch['loss_weights']) != 0))
  arrays = {name: np.stack(column) for name, column in columns.items()}
  left_out = arrays.pop('left_out')
  tokens = arrays.pop('weight').sum()
  # The sum and the largest of the probabilities left out, and their number.
  arrays['left_out'] = np.array(
    [left_out.sum(dtype=np.float64), left_out.max(), tokens], np.float64
  )
  return arrays


def _save(path: pathlib.Path, arrays: dict[str, Any], about: About) -> None:
  """Writes a file, whole or not at all."""
  partial = path.with_name(f'{path.name}.tmp')
  notes = {'about': about.digest, 'sha256': digest_of(arrays)}
  save_file(arrays, partial, notes)
  partial.replace(path)


def _is_whole(path: pathlib.Path, about: About) -> bool:
  """Whether a file is there, undamaged, and of these logits."""
  try:
    return load(path)[1].get('about') == about.digest
  except InputError:
    return False


def _write_manifest(folder: pathlib.Path, about: About) -> None:
  """Writes the manifest, with the size of all files and what they leave out."""
  left_out_sum, left_out_max, tokens, size = 0.0, 0.0, 0.0, 0
  for name, _ in about.files():
    left_out, file_max, count = load(folder / name)[0]['left_out'].tolist()
    left_out_sum, tokens = left_out_sum + left_out, tokens + count
    left_out_max = max(left_out_max, file_max)
    size += (folder / name).stat().st_size
  fields = {
    'format': FORMAT,
    'about': dataclasses.asdict(about),
    'bytes': size,
    'left_out_mean': left_out_sum / max(tokens, 1),
    'left_out_max': left_out_max,
  }
  workdir_lib.write_text(folder / MANIFEST, json.dumps(fields, indent=2) + '\n')


def add(commands: Any) -> None:
  """Adds the command `keep_logits`."""
  command = commands.add_parser(
    'keep_logits',
    help="writes a teacher's largest logits for the batches of a run",
    **command_line.about(__doc__),
  )
  command.set_defaults(run=_run)
  add = command.add_argument
  add('--teacher', required=True, help='folder of the teacher')
  add('--config', required=True, help="the student's config, whose data it is")
  add('--output', required=True, help='folder for config.distill.logits')
  number = command_line.POSITIVE
  add('--batches', type=number, default=0, help="default: the config's steps")
  add('--top', type=number, default=32, help='logits kept for each token')
  add('--dtype', choices=DTYPES, default=DTYPES[0])
  add('--step', type=command_line.NOT_NEGATIVE, help='default: the newest')


def _run(options: argparse.Namespace, overrides: list[str]) -> str:
  config = config_file.config_of(options.config, overrides)
  return write(
    options.teacher,
    options.output,
    sections.read(data.DataOptions, config.data, 'data.'),
    seed=config.seed,
    batch_size=config.batch_size,
    batches=options.batches or config.total_steps,
    top=options.top,
    dtype=options.dtype,
    step=options.step,
    allow=options.allow_module,
  ).describe()
