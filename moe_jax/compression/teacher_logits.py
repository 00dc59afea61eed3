"""A teacher's largest logits for the batches of a run, on disk.

    python -m moe_jax.compression keep_logits --teacher=runs/tiny \
      --config=moe_jax:tiny_switch --output=logits --batches=1000 --top=32

The folder has one file of numbers for each array, and a manifest, which is
written last: what a killed command left is no folder of logits, and the same
command begins anew. Kept are the logarithms of the `top` largest probabilities
of each token, and their ids; the manifest says how much probability that leaves
out. Row r of the folder, its batches one after another, is row r of the stream
of a run with the same data and seed.
"""

import argparse
import contextlib
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

from moe_jax import command_line, config_file, data, sections
from moe_jax.compression import whole_run
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
MANIFEST, FORMAT = 'manifest.json', 2
_DIGEST_BYTES = 8


@dataclasses.dataclass(frozen=True)
class StoredLogits:
  """A folder of logits, as its manifest describes it.

  Attributes:
    folder: The folder.
    step: The step of the teacher's checkpoint.
    sha256: The sha256 of the manifest of that checkpoint.
    data_digest: The sha256 of the data.
    seed: The seed of the order of the data.
    batch_size: The number B of rows of a batch.
    length: The number T of tokens of a row.
    vocab_size: The number V of tokens that the teacher tells apart.
    top: The number of logits that are kept for each token.
    batches: The number of batches, from that of step 0 on.
    left_out_mean: Probability that is left out at temperature 1, averaged over
      tokens.
    left_out_max: The most probability left out for a token, at temperature 1.
    files: The sha256 of the file of each array.
  """

  folder: pathlib.Path
  step: int
  sha256: str
  data_digest: str
  seed: int
  batch_size: int
  length: int
  vocab_size: int
  top: int
  batches: int
  left_out_mean: float = 0.0
  left_out_max: float = 0.0
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def num_rows(self) -> int:
    """The number of rows of all batches."""
    return self.batches * self.batch_size

  @property
  def size(self) -> int:
    """Bytes of all files of arrays."""
    return sum(self.path(name).stat().st_size for name in self.files)

  def path(self, name: str) -> pathlib.Path:
    """The path of the file of an array."""
    return self.folder / f'{name}.bin'

  def layout(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The type of each stored array, and the shape of its rows."""
    ids = np.uint16 if self.vocab_size <= 2**16 else np.int32
    shape = self.length, self.top
    return {
      IDS: (ids, shape),
      LOG_PROBS: (np.float16, shape),
      TARGETS: (np.uint8, (_DIGEST_BYTES,)),
    }

  def describe(self) -> str:
    """A line on the size of the logits, and on the probability left out."""
    full_size = 4 * self.num_rows * self.length * self.vocab_size
    return (
      f'{self.folder}: the {self.top} largest of {self.vocab_size} logits for '
      f'{self.batches} batches, {in_bytes(self.size)} '
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
      ValueError: Something differs, and all differences are listed; or a file
        is damaged.
    """
    o = run.options
    expected = {
      'data_digest': run.dataset.digest,
      'seed': o.seed,
      'length': o.data.target_len or o.data.seq_len,
      'vocab_size': run.model.vocab_size,
      'step': step,
      'sha256': sha256,
    }
    differences = [
      f'{key}: {getattr(self, key)!r} there, {value!r} here'
      for key, value in expected.items()
      if getattr(self, key) != value
    ]
    last_row = run.row_offset + o.total_steps * o.batch_size
    if self.num_rows < last_row:
      differences.append(f'{self.num_rows} rows there, {last_row} here')
    if differences:
      raise InputError(
        '\n'.join([f'distill.logits={self.folder} does not fit:', *differences])
      )
    for name, expected_sha256 in self.files.items():
      try:
        with open(self.path(name), 'rb') as file:
          digest = hashlib.file_digest(file, 'sha256').hexdigest()
      except OSError as error:
        raise InputError(f'{error}; write the logits again') from None
      if digest != expected_sha256:
        raise InputError(
          f"{self.path(name)} is damaged: its sha256 is not the manifest's"
        )

  def shapes(self, run: Run) -> dict[str, Any]:
    """The shapes of the arrays that a run's batch gets, with their sharding."""
    sharding = run.programs.put.sharding
    shape = (run.options.batch_size, self.length, self.top)
    return {
      IDS: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding),
      LOG_PROBS: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
    }

  @functools.cached_property
  def _arrays(self) -> dict[str, np.ndarray]:
    return {
      name: np.memmap(self.path(name), dtype, 'r').reshape(-1, *shape)
      for name, (dtype, shape) in self.layout().items()
    }

  def rows(self, numbers: Int[np.ndarray, ' R']) -> dict[str, np.ndarray]:
    """The arrays of rows: ids and log-probabilities [R, T, top], digests."""
    return {
      IDS: self._arrays[IDS][numbers].astype(np.int32),
      LOG_PROBS: self._arrays[LOG_PROBS][numbers].astype(np.float32),
      TARGETS: np.array(self._arrays[TARGETS][numbers]),
    }

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
    if (number := fields.pop('format')) != FORMAT:
      raise InputError(f'format {number}, not {FORMAT}; write the logits again')
    return StoredLogits(folder, **fields)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f'{path} cannot be read: {error!r}') from None


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
  stored = StoredLogits(
    pathlib.Path(output).expanduser(),
    step=run.step,
    sha256=trained.checkpoint_digest(run.folder, run.step),
    data_digest=dataset.digest,
    seed=seed,
    batch_size=batch_size,
    length=rows.take(np.arange(1))['targets'].shape[1],
    vocab_size=run.model.vocab_size,
    top=top,
    batches=batches,
  )
  folder = stored.folder
  _make_free(stored)
  stream = data.batch_dataset(rows, batch_size=batch_size, seed=seed)
  compute = jax.jit(functools.partial(largest, run.model, top=top))
  total, most, tokens = 0.0, 0.0, 0
  digests = {name: hashlib.sha256() for name in stored.layout()}
  with writing(folder), contextlib.ExitStack() as stack:
    files = {
      name: stack.enter_context(open(stored.path(name), 'wb'))
      for name in digests
    }
    for i in range(batches):
      batch: Any = stream[i]
      ids, log_probs, left_out = jax.device_get(compute(run.variables, batch))
      targets = row_digests(batch['targets'])
      arrays = {IDS: ids, LOG_PROBS: log_probs, TARGETS: targets}
      for name, (dtype, _) in stored.layout().items():
        values = arrays[name].astype(dtype).tobytes()
        files[name].write(values)
        digests[name].update(values)
      total += left_out.sum(dtype=np.float64)
      most = max(most, float(left_out.max()))
      tokens += int((np.asarray(batch['loss_weights']) != 0).sum())
  stored = dataclasses.replace(
    stored,
    left_out_mean=total / max(tokens, 1),
    left_out_max=most,
    files={name: sha.hexdigest() for name, sha in digests.items()},
  )
  fields = {'format': FORMAT, **dataclasses.asdict(stored)}
  del fields['folder']
  text = json.dumps(fields, indent=2) + '\n'
  workdir_lib.write_text(folder / MANIFEST, text)
  return stored


def _make_free(stored: StoredLogits) -> None:
  """Makes the folder, in which a killed command may have left files."""
  folder = stored.folder
  if folder.exists() and not folder.is_dir():
    raise InputError(f'{folder} is a file; it must be a folder')
  folder.mkdir(parents=True, exist_ok=True)
  files = {stored.path(name).name for name in stored.layout()}
  if others := {path.name for path in folder.iterdir()} - files:
    raise InputError(f'{folder} has {min(others)!r}; give a new folder')


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
