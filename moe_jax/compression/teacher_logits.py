"""A teacher's largest logits for the batches of a run, on disk.

    python -m moe_jax.compression keep_logits --teacher=runs/tiny \
      --config=moe_jax:tiny_switch --output=logits --batches=1000 --top=32

The folder has an array of rows, `np.load('logits/rows.npy', mmap_mode='r')`,
and a manifest, which is written last: what a killed command left is no folder
of logits, and the same command begins anew. A row has, for each token, the
logarithms of the `top` largest probabilities and their ids; the manifest says
how much probability that leaves out. Row r is for row r of the stream of
examples that a run with the same data and seed reads.
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

from moe_jax import cli, data
from moe_jax.compression import whole_run
from moe_jax.data.cache_folders import sha256
from moe_jax.data.plain_files import read_json
from moe_jax.devices import fetch, in_bytes
from moe_jax.errors import InputError, writing
from moe_jax.models import Model, code_trees
from moe_jax.models.logits import by_blocks
from moe_jax.runs import workdir as workdir_lib
from moe_jax.shapes import Array, Float32, Int32
from moe_jax.training import trained
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Fields of a row of logits; the first two are also in the batch of a run.
IN_BATCH = LOG_PROBS, IDS = 'teacher_log_probs', 'teacher_ids'
_BATCH_TYPES = {IDS: np.int32, LOG_PROBS: np.float32}
TARGETS = 'targets'  # the beginning of the sha256 of the row's targets
ROWS, MANIFEST, FORMAT = 'rows.npy', 'manifest.json', 3


@dataclasses.dataclass(frozen=True)
class StoredLogits:
  """A folder of logits, as its manifest describes it.

  Attributes:
    folder: The folder.
    step: The step of the teacher's checkpoint.
    sha256: The sha256 of the manifest of that checkpoint.
    data_digest: The sha256 of the data.
    seed: The seed of the order of the data.
    length: The number T of tokens of a row.
    vocab_size: The number V of tokens that the teacher tells apart.
    top: The number of logits that are kept for each token.
    num_rows: The number of rows.
    left_out_mean: The probability, at temperature 1, of the tokens that are not
      among the `top` ones, averaged over the tokens of the rows.
    left_out_max: The largest probability that is left out at any token.
    rows_sha256: The sha256 of the file of rows.
  """

  folder: pathlib.Path
  step: int
  sha256: str
  data_digest: str
  seed: int
  length: int
  vocab_size: int
  top: int
  num_rows: int
  left_out_mean: float = 0.0
  left_out_max: float = 0.0
  rows_sha256: str = ''

  @property
  def path(self) -> pathlib.Path:
    """The path of the file of rows, an array [num_rows] of type `row_type`."""
    return self.folder / ROWS

  @property
  def row_type(self) -> np.dtype:
    """NumPy's structured type of a row: ids, log-probabilities and a digest."""
    ids = np.uint16 if self.vocab_size <= 2**16 else np.int32
    shape = self.length, self.top
    return np.dtype(
      [(IDS, ids, shape), (LOG_PROBS, np.float16, shape), (TARGETS, np.uint64)]
    )

  def describe(self) -> str:
    """A line on the logits' size, and on the probability they leave out."""
    size = self.num_rows * self.row_type.itemsize
    full_size = 4 * self.num_rows * self.length * self.vocab_size
    return (
      f'{self.folder}: the {self.top} largest of {self.vocab_size} logits for '
      f'{self.num_rows} rows, {in_bytes(size)} ({size / full_size:.1%} of all '
      f'logits in float32); they leave out {self.left_out_mean:.3%} of the '
      f'probability on average, {self.left_out_max:.1%} at most, at '
      'temperature 1'
    )

  def check(self, run: Run, step: int, digest: str) -> None:
    """Checks that the stored logits are a teacher's for a run's batches.

    Args:
      run: The run.
      step: The step of the teacher's checkpoint.
      digest: The sha256 of the manifest of that checkpoint.

    Raises:
      ValueError: The logits are of another teacher or of other batches, and all
        differences are listed; or a file is damaged.
    """
    o = run.options
    expected = {
      'data_digest': run.dataset.digest,
      'seed': o.seed,
      'length': o.data.target_len or o.data.seq_len,
      'vocab_size': run.model.vocab_size,
      'step': step,
      'sha256': digest,
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
    if not self.path.exists() or sha256(self.path) != self.rows_sha256:
      raise InputError(
        f"{self.path} is missing or damaged: its sha256 is not the manifest's"
      )

  def shapes(self, run: Run) -> dict[str, Any]:
    """The shapes [B, T, top] and shardings of the logits in a run's batch.

    Their names are those in `IN_BATCH`.
    """
    shape = run.options.batch_size, self.length, self.top
    sharding = run.programs.put.sharding
    return {
      name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
      for name, dtype in _BATCH_TYPES.items()
    }

  @functools.cached_property
  def rows(self) -> np.ndarray:
    """The rows as a memory map: only rows that are indexed are read."""
    return np.load(self.path, mmap_mode='r', allow_pickle=False)

  def reader(self, run: Run) -> Callable[[TrainState], dict[str, jax.Array]]:
    """Returns a function, to be called once a step, for its batch's logits.

    It takes the state before the step, and returns arrays on the devices as
    `shapes` describes them. The step is read from the state at the first call,
    and is then counted, since reading a value from a device means waiting for
    it. The first call also checks that the targets of that step's batch and of
    the run's last one are those for which the logits were stored: with other
    weights of a mixture a run may have the same rows at first, and later other
    rows of every source.
    """
    put, number = run.programs.put, None
    batch_size = run.options.batch_size

    def next_batch(state: TrainState) -> dict[str, jax.Array]:
      nonlocal number
      if number is None:
        number = int(state.step)
        for batch_number in (number, run.options.total_steps - 1):
          self._check_targets(run, batch_number)
      rows = self.rows[run.row_offset + number * batch_size + put.rows]
      number += 1
      return put.local({n: rows[n].astype(t) for n, t in _BATCH_TYPES.items()})

    return next_batch

  def _check_targets(self, run: Run, number: int) -> None:
    """Raises ValueError if the targets of batch `number` are not the stored."""
    targets = fetch(next(run.batches(number))['targets'])
    first = run.row_offset + number * run.options.batch_size
    rows = self.rows[first:][: len(targets)]
    if not np.array_equal(row_digests(targets), rows[TARGETS]):
      raise InputError(
        f'{self.folder}: batch {number} has other targets than that of this '
        'run; the options of the data differ'
      )


def row_digests(targets: Any) -> np.ndarray:
  """The first 8 bytes of the sha256 of each of R rows of targets, uint64 [R].

  `targets` are token ids, [R, T].
  """
  rows = np.asarray(targets, np.int32)
  digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in rows]
  return np.frombuffer(b''.join(digests), np.uint64)


def read(folder: str | os.PathLike[str]) -> StoredLogits:
  """Reads the manifest of a folder of logits.

  Raises:
    ValueError: The folder has no manifest, or the manifest is damaged or of
      another format.
  """
  folder = pathlib.Path(folder).expanduser()
  path = folder / MANIFEST
  if not (fields := read_json(path)):
    raise InputError(
      f'{folder} has no finished logits: no {MANIFEST}; `python -m '
      'moe_jax.compression keep_logits` writes them'
    )
  if (number := fields.pop('format', None)) != FORMAT:
    raise InputError(
      f'{path} has format {number}, not {FORMAT}; write the logits again'
    )
  return StoredLogits(folder, **fields)


def largest(
  model: Model, variables: Any, batch: Mapping[str, Array], top: int
) -> tuple[
  Int32[Array, 'B T top'], Float32[Array, 'B T top'], Float32[Array, 'B T']
]:
  """Ids and log-probabilities of the likeliest tokens, largest first.

  The last of the three results is the summed probability of all other tokens,
  or 0 where the loss weight is 0.
  """
  model = model.with_deferred_logits()

  def of_tokens(logits, rows):
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    top_log_probs, ids = jax.lax.top_k(log_probs, top)
    left_out = jnp.maximum(1.0 - jnp.exp(top_log_probs).sum(-1), 0.0)
    left_out = jnp.where(rows['loss_weights'] != 0, left_out, 0.0)
    return ids.astype(jnp.int32), top_log_probs, left_out

  outputs, _ = model.apply(variables, **model.inputs(batch))
  return by_blocks(of_tokens, outputs, {'loss_weights': batch['loss_weights']})


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
  """Writes a teacher's largest logits for batches of a future run.

  A single process computes the logits, on its first device.

  Args:
    teacher: The folder of the teacher.
    output: A folder that is new or empty, or that a killed command left.
    options: The options of the run's data.
    seed: The run's seed.
    batch_size: The number of rows in a batch of the run.
    batches: The number of batches, from the batch of step 0 on.
    top: The number of logits to keep for each token, at most V.
    step: The step of the teacher's checkpoint; None is the newest good one.
    allow: Modules whose classes, named in the teacher's folder, may be
      imported.

  Raises:
    ValueError: The teacher's tokens or tasks are not those of the data, `top`
      is out of range, or `output` has other files.
    CheckpointError: No checkpoint is good.
  """
  run = whole_run.read(teacher, step=step, allow=allow)
  code_trees.check_plain(run.options.model, run.folder)
  dataset = run.options.load_data(run.folder, options)
  if not 1 <= top <= run.model.vocab_size:
    raise InputError(f'top={top} not in [1, vocab_size={run.model.vocab_size}]')
  rows = dataset.splits['train']
  stored = StoredLogits(
    pathlib.Path(output).expanduser(),
    step=run.step,
    sha256=trained.checkpoint_digest(run.folder, run.step),
    data_digest=dataset.digest,
    seed=seed,
    length=rows.take(np.arange(1))['targets'].shape[1],
    vocab_size=run.model.vocab_size,
    top=top,
    num_rows=batches * batch_size,
  )
  folder = stored.folder
  folder.mkdir(parents=True, exist_ok=True)
  # A killed command may have left rows, without a manifest.
  if others := {path.name for path in folder.iterdir()} - {ROWS}:
    raise InputError(f'{folder} has {min(others)!r}; give a new folder')
  stream = data.batch_dataset(rows, batch_size=batch_size, seed=seed)
  compute = jax.jit(functools.partial(largest, run.model, top=top))
  total, most, tokens = 0.0, 0.0, 0
  with writing(folder), open(stored.path, 'wb') as file:
    header = {
      'descr': np.lib.format.dtype_to_descr(stored.row_type),
      'fortran_order': False,
      'shape': (stored.num_rows,),
    }
    np.lib.format.write_array_header_2_0(file, header)
    for i in range(batches):
      batch: Any = stream[i]
      ids, log_probs, left_out = jax.device_get(compute(run.variables, batch))
      values = np.empty(batch_size, stored.row_type)
      values[IDS], values[LOG_PROBS] = ids, log_probs
      values[TARGETS] = row_digests(batch['targets'])
      file.write(values.tobytes())
      total += left_out.sum(dtype=np.float64)
      most = max(most, float(left_out.max()))
      tokens += int((np.asarray(batch['loss_weights']) != 0).sum())
  stored = dataclasses.replace(
    stored,
    left_out_mean=total / max(tokens, 1),
    left_out_max=most,
    rows_sha256=sha256(stored.path),
  )
  fields = {'format': FORMAT, **dataclasses.asdict(stored)}
  del fields['folder']
  text = json.dumps(fields, indent=2) + '\n'
  workdir_lib.write_text(folder / MANIFEST, text)
  return stored


def add(commands: Any) -> None:
  """Adds the command `keep_logits` to the commands of a parser."""
  text = "writes a teacher's largest logits for the batches of a run"
  command = commands.add_parser('keep_logits', help=text, **cli.about(__doc__))
  command.set_defaults(run=_run)
  add = command.add_argument
  add('--teacher', required=True, help='folder of the teacher')
  add('--config', required=True, help="the student's config, whose data it is")
  add('--output', required=True, help='folder for config.distill.logits')
  number = cli.POSITIVE
  add('--batches', type=number, default=0, help="default: the config's steps")
  add('--top', type=number, default=32, help='logits kept for each token')
  add('--step', type=cli.NOT_NEGATIVE, help='default: the newest')


def _run(options: argparse.Namespace, overrides: list[str]) -> str:
  config: Any = cli.config_of(options.config, overrides)
  return write(
    options.teacher,
    options.output,
    cli.said_options(data.DataOptions, options.config, overrides, 'data'),
    seed=config.seed,
    batch_size=config.batch_size,
    batches=options.batches or config.total_steps,
    top=options.top,
    step=options.step,
    allow=options.allow_module,
  ).describe()
