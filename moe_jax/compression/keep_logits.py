"""Computes and keeps a teacher's largest logits for the batches of a run.

    python -m moe_jax.compression keep_logits --teacher=runs/tiny \
      --config=configs/tiny_switch.py --output=logits --batches=1000 --top=32

The manifest is written last: what a killed command left is no folder of logits
yet, and the same command goes on with it. Not here: the folder
(`teacher_logits.py`).
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
  Kept,
  digest_of,
  load,
  read,
  row_digests,
)
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
  values, ids = jax.lax.top_k(log_probs, top)
  left_out = jnp.maximum(1.0 - jnp.exp(values).sum(-1), 0.0)
  left_out = jnp.where(batch['loss_weights'] != 0, left_out, 0.0)
  return ids.astype(jnp.int32), values, left_out


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
) -> Kept:
  """Writes a teacher's largest logits for batches of a run that is to come.

  One process computes them, on its first device. Files that are there, of the
  same teacher, data and sizes, are kept.

  Args:
    teacher: The folder of the teacher.
    output: The folder to write, new or left by the same command.
    options: The data of the run.
    seed: Its seed.
    batch_size: Its number of rows in a batch.
    batches: The number of batches, from that of step 0 on.
    top: The number of logits to keep for each token, at most V.
    dtype: The type in which they are kept.
    step: The step of the teacher's checkpoint; None is the newest good one.
    each: The number of batches in a file.
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
    raise ValueError(f'{run.folder} does not fit the data: {problem}')
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
  folder.mkdir(parents=True, exist_ok=True)
  compute = jax.jit(functools.partial(largest, run.model, top=top))
  for name, numbers in about.parts():
    if not _is_whole(folder / name, about):
      some = (stream[number] for number in numbers)
      arrays = _arrays(about, some, functools.partial(compute, run.variables))
      _save(folder / name, arrays, about)
  _write_manifest(folder, about)
  return read(folder)


def _check(
  run: whole_run.WholeRun, dataset: data.Dataset, top: int, dtype: str
) -> None:
  """Raises ValueError for a teacher or a number that does not fit."""
  old, new = run.options.ids_identity, dataset.tokenizer.ids_identity
  if old != new:
    raise ValueError(
      f'{run.folder} was trained on tokens of {old}, the data is of {new}'
    )
  if not 1 <= top <= run.model.vocab_size:
    raise ValueError(f'top={top} not in [1, vocab_size={run.model.vocab_size}]')
  if dtype not in DTYPES:
    raise ValueError(unknown_text('type of kept logits', dtype, DTYPES))


def _check_folder(folder: pathlib.Path, about: About) -> None:
  """Raises ValueError where a folder holds something else."""
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'{folder} is a file; it must be a folder')
  there = {path.name for path in folder.iterdir()} if folder.exists() else set()
  names = {name for name, _ in about.parts()}
  if other := there - names - {MANIFEST} - {f'{n}.tmp' for n in names}:
    raise ValueError(
      f'{folder} has {min(other)!r}, which these logits have not; give a new '
      'folder'
    )
  if MANIFEST in there and (kept := read(folder).about) != about:
    differ = [
      f'{key}: {getattr(kept, key)!r} -> {value!r}'
      for key, value in dataclasses.asdict(about).items()
      if getattr(kept, key) != value
    ]
    raise ValueError(f'{folder} holds other logits: {"; ".join(differ)}')


def _arrays(about: About, batches, compute) -> dict[str, Any]:
  """The arrays of a file, for consecutive batches."""
  small = about.vocab_size <= 2**16
  columns: dict[str, list] = {
    name: [] for name in (IDS, LOG_PROBS, TARGETS, 'left_out', 'weight')
  }
  for batch in batches:
    ids, values, left_out = jax.device_get(compute(batch))
    columns[IDS].append(ids.astype(np.uint16 if small else np.int32))
    columns[LOG_PROBS].append(values.astype(about.dtype))
    columns[TARGETS].append(row_digests(batch['targets']))
    columns['left_out'].append(left_out.astype(np.float32))
    columns['weight'].append(np.sum(np.asarray(batch['loss_weights']) != 0))
  arrays = {name: np.stack(column) for name, column in columns.items()}
  left_out = arrays.pop('left_out')
  tokens = arrays.pop('weight').sum()
  # The sum, the largest and the number of what is left out.
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
  except ValueError:
    return False


def _write_manifest(folder: pathlib.Path, about: About) -> None:
  """Writes the manifest, with the size of all and what is left out."""
  total, largest_one, tokens, size = 0.0, 0.0, 0.0, 0
  for name, _ in about.parts():
    own, most, count = load(folder / name)[0]['left_out'].tolist()
    total, tokens = total + own, tokens + count
    largest_one = max(largest_one, most)
    size += (folder / name).stat().st_size
  values = {
    'format': FORMAT,
    'about': dataclasses.asdict(about),
    'bytes': size,
    'left_out_mean': total / max(tokens, 1),
    'left_out_max': largest_one,
  }
  workdir_lib.write_text(folder / MANIFEST, json.dumps(values, indent=2) + '\n')


def add(commands: Any) -> None:
  """Adds the command `keep_logits`."""
  command = commands.add_parser(
    'keep_logits',
    help="writes a teacher's largest logits for the batches of a run",
    allow_abbrev=False,
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
