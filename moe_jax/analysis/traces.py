"""Routing traces: what each sparse layer chose, batch by batch.

A folder has `header.json` and chunks of records, written by `Writer`. In the
trace of a run that was killed and went on, each step counts once, as the last
session that took it recorded it. Training, evaluation and generation write
traces (`trace_hook.py`, `record_evaluation.py`, `moe_jax.generate --trace`).
Not here: the layout of the files (`trace_files.py`).
"""

import functools
import itertools
import os
import pathlib
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.analysis import trace_files
from moe_jax.analysis.trace_files import Chunk, Writer
from moe_jax.analysis.trace_packing import IDS, Entry, unpack
from moe_jax.analysis.trace_records import (
  Header,
  LayerChoices,
  LayerInfo,
  Record,
)
from moe_jax.data.cache_folders import whole_folder
from moe_jax.errors import InputError

__all__ = [
  'Header',
  'LayerChoices',
  'LayerInfo',
  'Record',
  'Trace',
  'Writer',
  'check_new',
  'read',
  'write',
]

# Chunks that are held in memory for each process that wrote.
_CACHED_CHUNKS = 2


class _Key(NamedTuple):
  """The key of a record, by which records are ordered."""

  step: int
  kind: str
  batch: int
  sequence: str


class _Block(NamedTuple):
  """A block of rows of a record: its chunk, and its number there."""

  chunk: Chunk
  number: int

  @property
  def entry(self) -> Entry:
    return self.chunk.entries[self.number]


class Trace:
  """A trace, whose chunks are read and checked as records are asked for.

  Attributes:
    header: Its header.
    incomplete: The number of records that are left out because a process was
      killed before it wrote its rows.
  """

  def __init__(
    self, header: Header, blocks: Mapping[_Key, list[_Block]], processes: int
  ):
    self.header = header
    newest = {key: _newest(copies) for key, copies in blocks.items()}
    self._blocks = {key: newest[key] for key in sorted(newest) if newest[key]}
    self.incomplete = len(blocks) - len(self._blocks)
    cached = functools.lru_cache(maxsize=_CACHED_CHUNKS * max(processes, 1))
    self._load = cached(trace_files.load)

  @property
  def kinds(self) -> tuple[str, ...]:
    """The kinds of records that there are, in alphabetical order."""
    return tuple(sorted({key.kind for key in self._blocks}))

  @property
  def steps(self) -> tuple[int, ...]:
    """The numbers of steps that there are records of, ascending."""
    return self.steps_of(None)

  def steps_of(self, kind: str | None) -> tuple[int, ...]:
    """The numbers of steps that there are records of a kind of, ascending."""
    return tuple(dict.fromkeys(key.step for key in self._keys(kind, None)))

  def __len__(self) -> int:
    """The number of records."""
    return len(self._blocks)

  def records(
    self, kind: str | None = None, steps: Container[int] | None = None
  ) -> Iterator[Record]:
    """The records, by step, kind, number of the batch and sequence.

    Args:
      kind: The kind of records; None: all.
      steps: The numbers of steps, such as a range; None: all.

    Raises:
      ValueError: There is no such kind, or a file is damaged.
    """
    if kind is not None and kind not in self.kinds:
      raise InputError(f'unknown kind {kind!r}; have {[*self.kinds]}')
    for key in self._keys(kind, steps):
      yield self._record(self._blocks[key])

  def _keys(
    self, kind: str | None, steps: Container[int] | None
  ) -> Iterator[_Key]:
    for key in self._blocks:
      if kind in (None, key.kind) and (steps is None or key.step in steps):
        yield key

  def _record(self, blocks: list[_Block]) -> Record:
    records = []
    for block in blocks:
      arrays = self._load(block.chunk.path)[block.number]
      records.append(unpack(arrays, block.entry, self.header))
    rows = [block.entry.rows for block in blocks]
    batch_size = blocks[0].entry.batch_size
    if len(records) == 1 and rows[0] == tuple(range(batch_size)):
      return records[0]
    return _joined(records, rows, batch_size)


def _newest(blocks: list[_Block]) -> list[_Block]:
  """The blocks of the newest session that has all rows; [] if none has.

  Raises:
    ValueError: A session has a row of the record twice.
  """
  for session in sorted({block.chunk.session for block in blocks})[::-1]:
    of_session = [block for block in blocks if block.chunk.session == session]
    rows = sorted(itertools.chain(*(block.entry.rows for block in of_session)))
    if len(set(rows)) < len(rows):
      entry, folder = of_session[0].entry, of_session[0].chunk.path.parent
      raise InputError(
        f'{folder}: session {session} has rows of batch '
        f'{entry.batch} of {entry.kind!r} at step {entry.step} twice'
      )
    if rows == [*range(of_session[0].entry.batch_size)]:
      return of_session
  return []


def _joined(
  records: list[Record], rows: list[tuple[int, ...]], batch_size: int
) -> Record:
  """The record of a whole batch from the rows that processes have of it."""

  def join(values: Iterable[Any], filler=0) -> Any:
    values = [*values]
    if values[0] is None:
      return None
    shape = np.max([v.shape[1:] for v in values], 0)  # K' may differ
    joined = np.full((batch_size, *shape), filler, values[0].dtype)
    for numbers, array in zip(rows, values, strict=True):
      extent = tuple(slice(size) for size in array.shape[1:])
      joined[(list(numbers), *extent)] = array
    return joined

  def layer(number: int) -> LayerChoices:
    experts, *fields = zip(*(r.layers[number] for r in records))
    return LayerChoices(join(experts, -1), *map(join, fields))

  ids = {name: join(getattr(r, name) for r in records) for name in IDS}
  return records[0]._replace(
    **ids, layers={i: layer(i) for i in records[0].layers}
  )


def read(folder: str | os.PathLike[str]) -> Trace:
  """Reads the header of a trace, and what its chunks hold.

  Raises:
    ValueError: There is no trace, or a file of it is damaged, missing or of
      another trace, and what differs is listed; or a record is there twice.
  """
  folder = pathlib.Path(folder).expanduser()
  header = trace_files.read_header(folder)
  chunks = trace_files.chunks(folder, header)
  starts = {chunk.session: chunk.start for chunk in chunks}
  blocks = defaultdict(list)
  for chunk in chunks:
    later_starts = [s for number, s in starts.items() if number > chunk.session]
    for number, entry in enumerate(chunk.entries):
      # A later session went on from a checkpoint, and took its steps anew. What
      # was evaluated before the checkpoint was saved may stand there alone.
      last = entry.step - (entry.kind != 'train')
      if last < min(later_starts, default=np.inf):
        key = _Key(entry.step, entry.kind, entry.batch, entry.sequence)
        blocks[key].append(_Block(chunk, number))
  return Trace(header, blocks, len({chunk.process for chunk in chunks}))


def check_new(folder: str | os.PathLike[str]) -> None:
  """Raises ValueError for a folder that has a trace."""
  if (pathlib.Path(folder).expanduser() / trace_files.HEADER).exists():
    raise InputError(f'{folder} has a trace already; give a new folder')


def write(
  folder: str | os.PathLike[str], header: Header, records: Iterable[Record]
) -> None:
  """Writes a whole trace, from one process.

  Raises:
    ValueError: The folder is not empty, or a record does not fit.
  """
  check_new(folder)
  path = pathlib.Path(folder).expanduser()
  with whole_folder(path) as unfinished, Writer(unfinished, header) as writer:
    for record in records:
      writer.add(record)
