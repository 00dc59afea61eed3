"""Files of routing traces: chunks of packed records, and their writer.

A chunk appears under its name when it is whole, so a killed run leaves only
whole ones. Each start of a run is a session with files of its own. Not here:
the arrays of a record (`trace_packing.py`), and which of two sessions' records
counts (`traces.py`).
"""

import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.analysis.trace_packing import Arrays, Entry, pack
from moe_jax.analysis.trace_records import Header, Record
from moe_jax.errors import InputError, writing

HEADER = 'header.json'
_NAME = re.compile(r'session_(\d+)_process_(\d+)_part_(\d+)\.safetensors')
_CHUNK_BYTES = 2**23


class Chunk(NamedTuple):
  """A file of records, whose arrays are not read yet.

  Attributes:
    path: The file.
    session: The number of the start of the run that wrote it.
    process: The number of the process.
    part: The number of the file among those of session and process.
    start: The number of optimizer steps with which the session began.
    entries: Its records.
  """

  path: pathlib.Path
  session: int
  process: int
  part: int
  start: int
  entries: tuple[Entry, ...]


def digest_of(arrays: Mapping[str, np.ndarray], text: str) -> str:
  """The sha256 of arrays, their names, types and shapes, and a text."""
  sha = hashlib.sha256(text.encode())
  for name in sorted(arrays):
    array = np.ascontiguousarray(arrays[name])
    sha.update(f'{name} {array.dtype} {array.shape}'.encode())
    sha.update(array.data if array.size else b'')
  return sha.hexdigest()


def chunks(folder: pathlib.Path, header: Header) -> list[Chunk]:
  """The finished chunks of a folder, in the order of their names.

  Raises:
    ValueError: A file is damaged, missing, or of another trace.
  """
  finished = []
  for path in sorted(folder.iterdir()):
    if numbers := _NAME.fullmatch(path.name):
      session, process, part = map(int, numbers.groups())
      finished.append(_chunk(path, session, process, part, header))
  process_key = lambda chunk: (chunk.session, chunk.process)  # noqa: E731
  for (_, process), group in itertools.groupby(finished, process_key):
    numbers = [chunk.part for chunk in group]
    if numbers != [*range(len(numbers))]:
      raise InputError(f'{folder}: process {process} has parts {numbers} alone')
  return finished


def _chunk(path, session: int, process: int, part: int, header: Header):
  try:
    with safe_open(path, 'numpy') as file:
      metadata = file.metadata() or {}
    entries = [Entry.of(entry) for entry in json.loads(metadata['entries'])]
    file_header = Header.from_json(metadata['header'])
    start = int(metadata['start'])
  except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
    raise InputError(f'{path} cannot be read: {error!r}') from None
  header.check_same(file_header, str(path))
  return Chunk(path, session, process, part, start, tuple(entries))


def load(path: pathlib.Path) -> list[Arrays]:
  """The arrays of each record of a chunk.

  Raises:
    ValueError: The file is damaged, or was changed.
  """
  try:
    with safe_open(path, 'numpy') as file:
      names = file.keys()
      arrays = {name: file.get_tensor(name) for name in names}
      metadata = file.metadata() or {}
  except (OSError, SafetensorError) as error:
    raise InputError(f'{path} cannot be read: {error}') from None
  entries = metadata.get('entries', '[]')
  if metadata.get('sha256') != digest_of(arrays, entries):
    raise InputError(f'{path} is damaged: its sha256 is not that of its arrays')
  records = [{} for _ in json.loads(entries)]
  for name, array in arrays.items():
    number, _, rest = name.partition('/')
    records[int(number)][rest] = array
  return records


def last_session(folder: pathlib.Path) -> int:
  """The number of the newest session with a chunk in a folder; 0 for none."""
  names = os.listdir(folder) if folder.is_dir() else []
  sessions = [int(m.group(1)) for m in map(_NAME.fullmatch, names) if m]
  return max(sessions, default=0)


class Writer:
  """Writes the records of one process into a folder, chunk by chunk.

  Args:
    folder: The folder, which is made if it is missing. Where it has a trace,
      the new records go on from it: they replace those from step `start` on.
    header: The header; that of a trace in the folder must be the same.
    process: The number of this process.
    start: The number of optimizer steps with which this session begins.
    session: The number of the session, equal in all its processes; None: one
      more than the newest in the folder.
    chunk_bytes: The bytes of records after which a chunk is written.

  Raises:
    ValueError: The folder has another trace; what differs is listed.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    header: Header,
    *,
    process: int = 0,
    start: int = 0,
    session: int | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
  ):
    self._folder = pathlib.Path(folder).expanduser()
    self._folder.mkdir(parents=True, exist_ok=True)
    self._header = header
    if session is None:
      session = last_session(self._folder) + 1
    self._prefix = f'session_{session:05d}_process_{process:05d}_part_'
    self._start, self._chunk_bytes = start, chunk_bytes
    self._part, self._bytes = 0, 0
    self._entries: list[Entry] = []
    self._arrays: Arrays = {}
    check(self._folder, header)
    path = self._folder / HEADER
    if process == 0 and not path.exists():
      _write_atomically(path, lambda to: to.write_text(header.to_json()))

  def add(
    self,
    record: Record,
    rows: Iterable[int] | None = None,
    batch_size: int | None = None,
  ) -> None:
    """Adds a record; it is in a file once its chunk is full, or on `flush`.

    Args:
      record: The record, or the rows of it that this process has.
      rows: The numbers of these rows in the batch; None: all of them.
      batch_size: The number of rows of the whole batch, where `rows` is given.

    Raises:
      ValueError: The record does not fit the header.
      OSError: The chunk cannot be written.
    """
    arrays = pack(record, self._header)
    count = len(record.tokens)
    numbers = tuple(range(count) if rows is None else map(int, rows))
    if len(numbers) != count:
      raise InputError(f'{len(numbers)} numbers of rows for {count} rows')
    index = len(self._entries)
    self._entries.append(
      Entry(
        record.kind,
        int(record.step),
        int(record.batch),
        record.sequence,
        numbers,
        batch_size or count,
        tuple(record.layers),
      )
    )
    self._arrays |= {f'{index}/{name}': a for name, a in arrays.items()}
    self._bytes += sum(array.nbytes for array in arrays.values())
    if self._bytes >= self._chunk_bytes:
      self.flush()

  def flush(self) -> None:
    """Writes the records that are in no file yet, if there are any."""
    if not self._entries:
      return
    entries = json.dumps(self._entries)
    metadata = {
      'entries': entries,
      'header': self._header.to_json(),
      'start': str(self._start),
      'sha256': digest_of(self._arrays, entries),
    }
    path = self._folder / f'{self._prefix}{self._part:08d}.safetensors'
    _write_atomically(path, lambda to: save_file(self._arrays, to, metadata))
    self._part, self._bytes = self._part + 1, 0
    self._entries, self._arrays = [], {}

  close = flush

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def check(folder: pathlib.Path, header: Header) -> None:
  """Checks that a trace with this header may go on in a folder.

  Raises:
    ValueError: The folder has another trace; what differs is listed.
  """
  if (folder / HEADER).exists():
    header.check_same(read_header(folder), str(folder))


def read_header(folder: pathlib.Path) -> Header:
  """The header of a folder; raises ValueError if it has none."""
  path = folder / HEADER
  try:
    return Header.from_json(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise InputError(
      f'{folder} has no trace, as moe_jax.analysis.record_evaluation or a run '
      f'with config.trace writes it: {error}'
    ) from None
  except ValueError as error:
    raise InputError(f'{path}: {error}') from None


def _write_atomically(path: pathlib.Path, write) -> None:
  unfinished = path.with_name(path.name + '.tmp')
  with writing(path):
    write(unfinished)
    unfinished.replace(path)
