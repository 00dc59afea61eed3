"""A teacher's largest logits for the batches of a run, on disk.

    python -m moe_jax.compression keep_logits --teacher=runs/tiny \
      --config=moe_jax:tiny_switch --output=logits --batches=1000 --top=32

The folder has files of a few batches each (safetensors) and a manifest, which
is written last: what a killed command left is no folder of logits, and the same
command begins anew. Kept are the logarithms of the `top` largest probabilities
of each token, and their ids; the manifest says how much probability that leaves
out. Row r of the folder, its batches one after another, is row r of the stream
of a run with the same data and seed.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax import command_line, config_file, data, sections
from moe_jax.compression import whole_run
from moe_jax.data.mixing import joined
from moe_jax.errors import InputError, writing
from moe_jax.memory_room import in_bytes
from moe_jax.models import Model, code_trees
from moe_jax.runs import trained
from moe_jax.runs import workdir as workdir_lib
from moe_jax.shapes import Array, Float32, Int, Int32
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Names of arrays, the first two also in the batch of a run.
IDS, LOG_PROBS = 'teacher_ids', 'teacher_log_probs'
TARGETS = 'targets'  # beginnings of the sha256 of each row's targets
MANIFEST, FORMAT, BATCHES_A_FILE = 'manifest.json', 1, 16
_DIGEST_BYTES = 8
_DTYPES = {IDS: np.int32, LOG_PROBS: np.float32, TARGETS: np.uint8}
_PREFIX = 'logits_'


@dataclasses.dataclass(frozen=True)
class About:
  """The description of a folder of logits, which its manifest holds.

  Attributes:
    teacher: The folder of the teacher.
    step: The step of the teacher's checkpoint.
    sha256: The sha256 of the manifest of that checkpoint.
    data_digest: The sha256 of the data.
    seed: The seed of the order of the data.
    batch_size: The number B of rows of a batch.
    length: The number T of tokens of a row.
    vocab_size: The number V of tokens that the teacher tells apart.
    top: The number of logits that are kept for each token.
    dtype: The type of the logits.
    batches: The number of batches, from that of step 0 on.
    each: The number of batches in a file; the last may have fewer.
  """

  teacher: str
  step: int
  sha256: str
  data_digest: str
  seed: int
  batch_size: int
  length: int
  vocab_size: int
  top: int
  dtype: str
  batches: int
  each: int

  @property
  def digest(self) -> str:
    """The sha256 of all attributes."""
    text = json.dumps(dataclasses.asdict(self), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class StoredLogits:
  """A folder of logits, whose files are checked as they are read.

  Attributes:
    folder: The folder.
    about: The description in the folder's manifest.
    size: Bytes of all files.
    left_out_mean: Probability that is left out at temperature 1, averaged over
      tokens.
    left_out_max: The most probability left out for a token, at temperature 1.
  """

  folder: pathlib.Path
  about: About
  size: int
  left_out_mean: float
  left_out_max: float

  def describe(self) -> str:
    """A line on the size of the logits, and on the probability left out."""
    a = self.about
    full_size = 4 * a.batches * a.batch_size * a.length * a.vocab_size
    return (
      f'{self.folder}: the {a.top} largest of {a.vocab_size} logits for '
      f'{a.batches} batches, {in_bytes(self.size)} '
      f'({self.size / full_size:.1%} of all logits in float32); they leave out '
      f'{self.left_out_mean:.3%} of the probability on average, '
      f'{self.left_out_max:.1%} at most, at temperature 1'
    )

  def check(self, run: Run, step: int, sha256: str) -> None:
    """Checks that these are the logits of a teacher for a run's batches.

    Args:
      run: The run.
      step: The step of the teacher's checkpoint.
      sha256: The sha256 of the manifest of that checkpoint.

    Raises:
      ValueError: Something differs; all differences are listed.
    """
    a, o = self.about, run.options
    expected = {
      'data_digest': run.dataset.digest,
      'seed': o.seed,
      'length': o.data.target_len or o.data.seq_len,
      'vocab_size': run.model.vocab_size,
      'step': step,
      'sha256': sha256,
    }
    differences = [
      f'{key}: {getattr(a, key)!r} there, {value!r} here'
      for key, value in expected.items()
      if getattr(a, key) != value
    ]
    rows = a.batches * a.batch_size
    last_row = run.row_offset + o.total_steps * o.batch_size
    if rows < last_row:
      differences.append(f'{rows} rows there, {last_row} here')
    if differences:
      raise InputError(
        '\n'.join([f'distill.logits={self.folder} does not fit:', *differences])
      )

  def shapes(self, run: Run) -> dict[str, Any]:
    """The shapes of the arrays that a run's batch gets, with their sharding."""
    sharding = run.programs.put.sharding
    shape = (run.options.batch_size, self.about.length, self.about.top)
    return {
      IDS: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding),
      LOG_PROBS: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
    }

  def rows(self, numbers: Int[np.ndarray, ' R']) -> dict[str, np.ndarray]:
    """The arrays of rows: ids and log-probabilities [R, T, top], digests.

    Raises:
      ValueError: There is no such row, or its file is damaged.
    """
    a = self.about
    last = a.batches * a.batch_size - 1
    if not 0 <= numbers.min() <= numbers.max() <= last:
      raise InputError(
        f'{self.folder} has rows 0 to {last}, not {numbers.min()} to '
        f'{numbers.max()}'
      )
    file, index = np.divmod(numbers, a.each * a.batch_size)

    def read_file(number: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
      arrays = _read_file(self.folder, a, number)
      return {
        name: np.concatenate(arrays[name])[index[chosen]].astype(dtype)
        for name, dtype in _DTYPES.items()
      }

    return joined(file, read_file)

  def reader(self, run: Run) -> Callable[[TrainState], dict[str, jax.Array]]:
    """A function that is called once a step and gives its batch's logits.

    The step is read from the state at the first call, and is then counted,
    since a number on a device would have to be waited for. The first call also
    checks that the targets of the run's own batch, and of its last one, are
    those that the logits are for: other weights of a mixture may give the same
    rows at first, and later shift those of every source.
    """
    layout, number = run.programs.put, None

    def next_batch(state: TrainState) -> dict[str, jax.Array]:
      nonlocal number
      if number is None:
        number = int(state.step)
        for checked_number in (number, run.options.total_steps - 1):
          self._check_targets(run, checked_number)
      arrays = self.rows(_rows_of(run, number))
      number += 1
      return layout.local({n: arrays[n] for n in (IDS, LOG_PROBS)})

    return next_batch

  def _check_targets(self, run: Run, number: int) -> None:
    """Raises ValueError where batch `number` of a run has other targets."""
    run_batch: Any = data.batch_dataset(
      run.dataset.splits['train'],
      batch_size=run.options.batch_size,
      seed=run.options.seed,
      share=run.programs.put.rows,
      offset=run.row_offset,
    )[number]
    digests = self.rows(_rows_of(run, number))[TARGETS]
    if not np.array_equal(row_digests(run_batch['targets']), digests):
      raise InputError(
        f'{self.folder}: batch {number} has other targets than that of this '
        'run; the options of the data differ'
      )


def _rows_of(run: Run, number: int) -> Int[np.ndarray, ' R']:
  """The numbers, in the stream, of this process' rows of a run's batch."""
  first = run.row_offset + number * run.options.batch_size
  return first + run.programs.put.rows


def row_digests(targets: Any) -> np.ndarray:
  """The first bytes of the sha256 of each row, uint8 [R, 8]."""
  rows = np.asarray(targets, np.int32)
  digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
  return np.array([[*d[:_DIGEST_BYTES]] for d in digests], np.uint8)


def read(folder: str | os.PathLike[str]) -> StoredLogits:
  """Reads the manifest of a folder of logits.

  Raises:
    ValueError: There is no manifest, or it cannot be read.
  """
  folder = pathlib.Path(folder).expanduser()
  path = folder / MANIFEST
  if not path.exists():
    raise InputError(
      f'{folder} has no finished logits: no {MANIFEST}; `python -m '
      'moe_jax.compression keep_logits` writes them'
    )
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
    if fields['format'] != FORMAT:
      raise InputError(f'format {fields["format"]}, not {FORMAT}')
    return StoredLogits(
      folder,
      About(**fields['about']),
      int(fields['bytes']),
      float(fields['left_out_mean']),
      float(fields['left_out_max']),
    )
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f'{path} cannot be read: {error!r}') from None


def _path(folder: pathlib.Path, about: About, number: int) -> pathlib.Path:
  """The path of file `number`, which its first batch names."""
  return folder / f'{_PREFIX}{number * about.each:08d}.safetensors'


@functools.lru_cache(maxsize=2)
def _read_file(folder: pathlib.Path, about: About, number: int) -> Any:
  """The arrays of file `number`; those of the last files are remembered."""
  path = _path(folder, about, number)
  try:
    with safe_open(path, 'numpy') as file:
      names = file.keys()
      arrays = {name: file.get_tensor(name) for name in names}
      metadata = file.metadata()
  except (OSError, SafetensorError) as error:
    raise InputError(f'{path} cannot be read: {error}') from None
  if metadata != _metadata(about, arrays):
    raise InputError(f'{path} is damaged, or not what the manifest says')
  return arrays


def _metadata(about: About, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
  """The sha256 of the description, and that of the arrays and their names."""
  sha = hashlib.sha256()
  for name in sorted(arrays):
    sha.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
  return {'about': about.digest, 'sha256': sha.hexdigest()}


def largest(
  model: Model, variables: Any, batch: Mapping[str, Array], top: int
) -> tuple[
  Int32[Array, 'B T top'], Float32[Array, 'B T top'], Float32[Array, 'B T']
]:
  """Ids and log-probabilities of the likeliest tokens, largest first.

  The last value is the probability of all other tokens, 0 where the loss weight
  is 0.
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
  step: int | None = None,
  each: int = BATCHES_A_FILE,
  allow: Iterable[str] = (),
) -> StoredLogits:
  """Writes a teacher's largest logits for batches of a run that is to come.

  One process computes them, on its first device.

  Args:
    teacher: The folder of the teacher.
    output: A folder that is new or empty, or that a killed command left.
    options: The options of the run's data.
    seed: The run's seed.
    batch_size: The number of rows in a batch of the run.
    batches: The number of batches, from that of step 0 on.
    top: The number of logits to keep for each token, at most V.
    step: The step of the teacher's checkpoint; None is the newest good one.
    each: The number of batches in each file.
    allow: Modules whose classes, named in the teacher's folder, may be
      imported.

  Raises:
    ValueError: The teacher's tokens or tasks are not those of the data, `top`
      is out of range, or `output` has something else.
    CheckpointError: No checkpoint is good.
  """
  run = whole_run.read(teacher, step=step, allow=allow)
  code_trees.check_plain(run.options.model, run.folder)
  dataset = run.load_data(options)
  if not 1 <= top <= run.model.vocab_size:
    raise InputError(f'top={top} not in [1, vocab_size={run.model.vocab_size}]')
  rows = dataset.splits['train']
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
    dtype='float16',
    batches=batches,
    each=each,
  )
  folder = _free_folder(output)
  stream = data.batch_dataset(rows, batch_size=batch_size, seed=seed)
  compute = jax.jit(functools.partial(largest, run.model, top=top))
  total, most, tokens, size = 0.0, 0.0, 0, 0
  with writing(folder):
    for number, first in enumerate(range(0, batches, each)):
      columns: dict[str, list[np.ndarray]] = {name: [] for name in _DTYPES}
      for i in range(first, min(first + each, batches)):
        batch: Any = stream[i]
        ids, log_probs, left_out = jax.device_get(compute(run.variables, batch))
        columns[IDS].append(ids)
        columns[LOG_PROBS].append(log_probs.astype(about.dtype))
        columns[TARGETS].append(row_digests(batch['targets']))
        total += left_out.sum(dtype=np.float64)
        most = max(most, float(left_out.max()))
        tokens += int((np.asarray(batch['loss_weights']) != 0).sum())
      arrays = {name: np.stack(column) for name, column in columns.items()}
      if about.vocab_size <= 2**16:
        arrays[IDS] = arrays[IDS].astype(np.uint16)
      path = _path(folder, about, number)
      save_file(arrays, path, _metadata(about, arrays))
      size += path.stat().st_size
    fields = {
      'format': FORMAT,
      'about': dataclasses.asdict(about),
      'bytes': size,
      'left_out_mean': total / max(tokens, 1),
      'left_out_max': most,
    }
    text = json.dumps(fields, indent=2) + '\n'
    workdir_lib.write_text(folder / MANIFEST, text)
  return read(folder)


def _free_folder(output: str | os.PathLike[str]) -> pathlib.Path:
  """Makes a folder, without files of logits that a killed command left."""
  folder = pathlib.Path(output).expanduser()
  if folder.exists() and not folder.is_dir():
    raise InputError(f'{folder} is a file; it must be a folder')
  folder.mkdir(parents=True, exist_ok=True)
  paths = sorted(folder.iterdir())
  for path in paths:
    if not path.match(f'{_PREFIX}*.safetensors'):
      raise InputError(f'{folder} has {path.name!r}; give a new folder')
  for path in paths:
    path.unlink()
  return folder


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
    step=options.step,
    allow=options.allow_module,
  ).describe()
