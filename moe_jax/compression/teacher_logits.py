"""A teacher's largest logits for the batches of a run, as a folder has them.

The folder has files of a few batches each (safetensors) and a manifest. Kept
are the logarithms of the `top` largest probabilities of each token, and their
ids; the manifest says how much probability that leaves out. Row r of the
folder, its batches one after another, is row r of the stream of a run with the
same data and seed.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from moe_jax import data
from moe_jax.compression.soft_labels import IDS, LOG_PROBS
from moe_jax.compression.teacher import Teacher
from moe_jax.data.mixing import joined
from moe_jax.errors import InputError
from moe_jax.memory_room import in_bytes
from moe_jax.shapes import Int
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

MANIFEST, FORMAT = 'manifest.json', 1
TARGETS = 'targets'  # beginnings of the sha256 of each row's targets
_DIGEST_BYTES = 8
_DTYPES = {IDS: np.int32, LOG_PROBS: np.float32, TARGETS: np.uint8}
_COUNTS = ('batch_size', 'length', 'vocab_size', 'top', 'batches', 'each')


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
    dtype: The type of the logits, 'float16' or 'float32'.
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

  def __post_init__(self):
    for name in _COUNTS:
      if type(value := getattr(self, name)) is not int or value < 1:
        raise InputError(f'{name}={value!r:.40} is not a number of at least 1')

  @property
  def rows(self) -> int:
    """The number of rows of all batches."""
    return self.batches * self.batch_size

  @property
  def digest(self) -> str:
    """The sha256 of all attributes."""
    text = json.dumps(dataclasses.asdict(self), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def files(self) -> Iterator[tuple[str, range]]:
    """The name of each file, and the numbers of its batches."""
    for start in range(0, self.batches, self.each):
      numbers = range(start, min(start + self.each, self.batches))
      yield f'logits_{start:08d}.safetensors', numbers


def row_digests(targets: Any) -> np.ndarray:
  """The first bytes of the sha256 of each row, uint8 [R, 8]."""
  rows = np.asarray(targets, np.int32)
  digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
  return np.array([[*d[:_DIGEST_BYTES]] for d in digests], np.uint8)


def digest_of(arrays: Mapping[str, np.ndarray]) -> str:
  """The sha256 of arrays and their names, in hex."""
  sha = hashlib.sha256()
  for name in sorted(arrays):
    sha.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
  return sha.hexdigest()


def load(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The arrays of a file, and its metadata.

  Raises:
    ValueError: The file is not there, is damaged, or was changed.
  """
  try:
    with safe_open(path, 'numpy') as file:
      names = file.keys()
      arrays = {name: file.get_tensor(name) for name in names}
      metadata = file.metadata() or {}
  except (OSError, SafetensorError) as error:
    raise InputError(f'{path} cannot be read: {error}') from None
  if metadata.get('sha256') != digest_of(arrays):
    raise InputError(f'{path} is damaged: its sha256 is not that of its arrays')
  return arrays, metadata


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

  def check(self, run: Run, teacher: Teacher) -> None:
    """Checks that these are the logits of a run's teacher for its batches.

    Raises:
      ValueError: Something differs; all differences are listed.
    """
    a, o = self.about, run.options
    last_row = run.row_offset + o.total_steps * o.batch_size
    expected = {
      'data_digest': run.dataset.digest,
      'seed': o.seed,
      'length': o.data.target_len or o.data.seq_len,
      'vocab_size': run.model.vocab_size,
      'step': teacher.step,
      'sha256': teacher.digest,
    }
    differences = [
      f'{key}: {getattr(a, key)!r} there, {value!r} here'
      for key, value in expected.items()
      if getattr(a, key) != value
    ]
    if a.rows < last_row:
      differences.append(f'{a.rows} rows there, {last_row} here')
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
    if not 0 <= numbers.min() <= numbers.max() < a.rows:
      raise InputError(
        f'{self.folder} has rows 0 to {a.rows - 1}, not {numbers.min()} to '
        f'{numbers.max()}'
      )
    file, index = np.divmod(numbers, a.each * a.batch_size)

    def read_file(number: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
      arrays = _arrays(self.folder, a, number)
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


@functools.lru_cache(maxsize=2)
def _arrays(folder: pathlib.Path, about: About, number: int) -> dict[str, Any]:
  """The arrays of file `number`; those of the last files are remembered."""
  name, numbers = [*about.files()][number]
  arrays, metadata = load(folder / name)
  shape = (len(numbers), about.batch_size, about.length, about.top)
  shapes = {arrays[name].shape for name in (IDS, LOG_PROBS) if name in arrays}
  if metadata.get('about') != about.digest or shapes != {shape}:
    raise InputError(f'{folder / name} has other logits than the manifest says')
  return arrays


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
      'moe_jax.compression keep_logits` writes them, and goes on where it was '
      'stopped'
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
