"""Recording of choices in the background, from devices into a trace.

Arrays are copied from the devices while these go on; a thread makes records of
the rows that this process has, and writes them. Not here: which steps are
recorded (`trace_hook.py`).
"""

import os
import pathlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from moe_jax import distributed
from moe_jax.analysis import trace_files
from moe_jax.analysis.trace_records import Header, LayerChoices, Record
from moe_jax.analysis.traces import Writer
from moe_jax.errors import InputError
from moe_jax.models import Model
from moe_jax.models.recorded import Choices, Recorded
from moe_jax.shapes import Leaf

# Batches that may wait for the thread; the devices hold their arrays meanwhile.
_QUEUE_SIZE = 8
# The keys of a batch from which the fields of a record come.
_KEYS = {
  'tokens': 'tokens',
  'positions': 'positions',
  'documents': 'segment_ids',
  'sources': 'task_ids',
}


class _Local(NamedTuple):
  """The rows of an array that this process writes, on their way to the host.

  Attributes:
    starts: The number of the first row of each block.
    blocks: The blocks of rows, on their devices.
  """

  starts: tuple[int, ...]
  blocks: tuple[Leaf, ...]

  @classmethod
  def of(cls, array: Leaf) -> '_Local':
    """Begins to copy an array; one process copies each of equal blocks."""
    if not isinstance(array, jax.Array):
      return cls((0,), (array,))
    shards = [s for s in array.addressable_shards if s.replica_id == 0]
    shards.sort(key=lambda shard: shard.index[0].start or 0)
    for shard in shards:
      shard.data.copy_to_host_async()
    starts = tuple(shard.index[0].start or 0 for shard in shards)
    return cls(starts, tuple(shard.data for shard in shards))

  @property
  def rows(self) -> np.ndarray:
    """The numbers of the rows, ascending."""
    pairs = zip(self.starts, self.blocks, strict=True)
    rows = [np.arange(start, start + block.shape[0]) for start, block in pairs]
    return np.concatenate([np.zeros(0, int), *rows])

  def host(self) -> np.ndarray:
    """The values of the rows; waits for the device."""
    blocks = [np.asarray(block) for block in self.blocks]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def records_of(
  model: Model,
  kind: str,
  step: int,
  number: int,
  batch: Mapping[str, np.ndarray],
  choices: Mapping[int, Recorded],
) -> Iterator[Record]:
  """The records of a batch, one for each sequence that sparse layers see.

  Args:
    model: The model.
    kind, step, number: See `Record`.
    batch: The arrays of the batch, on the host.
    choices: The choices of layers, on the host.
  """
  for prefix in model.sequences:
    layers = {
      i: _layer_choices(recorded)
      for i, recorded in choices.items()
      if model.sequence_of(i) == prefix
    }
    if layers:
      ids: dict[str, Any] = {
        name: batch.get(f'{prefix}{key}') for name, key in _KEYS.items()
      }
      yield Record(
        kind, step, number, **ids, layers=layers, sequence=prefix.rstrip('_')
      )


def _layer_choices(recorded: Recorded) -> LayerChoices:
  no_choice = np.iinfo(recorded.expert.dtype).max
  expert = recorded.expert.astype(np.int32)
  expert[recorded.expert == no_choice] = -1
  arrays: Any = expert, *recorded[1:]
  return LayerChoices(*arrays)


class Recorder:
  """Writes the choices of batches into a folder, on a thread of its own.

  If the trace cannot be written, the run goes on without it, and says so.

  Args:
    folder: The folder of the trace.
    header: Its header.
    model: The model.
    message: Called with a line of text if recording ends before its time.

  Raises:
    ValueError: The folder has another trace; what differs is listed.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    header: Header,
    model: Model,
    message: Callable[[str], None] = print,
  ):
    self._folder, self._header = pathlib.Path(folder).expanduser(), header
    self._model, self._message = model, message
    self._queue: queue.Queue = queue.Queue(_QUEUE_SIZE)
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None
    self._is_reported = False
    try:
      trace_files.check(self._folder, header)
    except InputError as error:
      text = f'{error}; move this folder away to record anew'
      raise InputError(text) from None

  def begin(self, step: int) -> None:
    """Begins at the first call; all processes make it at the same moment.

    Args:
      step: The number of optimizer steps taken; an older trace in the folder
        keeps what it has of earlier ones.
    """
    if self._thread is not None:
      return
    session = trace_files.last_session(self._folder) + 1
    writer = Writer(
      self._folder,
      self._header,
      process=jax.process_index(),
      start=step,
      session=int(distributed.from_first(float(session))),
    )
    self._thread = threading.Thread(
      target=self._work, args=(writer,), name='routing trace', daemon=True
    )
    self._thread.start()

  def add(
    self,
    kind: str,
    step: int,
    number: int,
    batch: Mapping[str, Leaf],
    choices: Choices,
  ) -> None:
    """Records a batch; waits only if several batches wait to be written.

    Args:
      kind, step, number: See `Record`.
      batch: The batch.
      choices: The choices that were made in it.
    """
    self._report()
    keys = {
      f'{prefix}{key}'
      for prefix in self._model.sequences
      for key in _KEYS.values()
    }
    batch = {k: _Local.of(v) for k, v in batch.items() if k in keys}
    local = jax.tree.map(_Local.of, choices)
    self._queue.put((kind, step, number, batch, local))

  def flush(self) -> None:
    """Waits until all added records are in files."""
    if self._thread is not None:
      written = threading.Event()
      self._queue.put(written)
      written.wait()
    self._report()

  def close(self) -> None:
    """Writes the records that still wait, and ends the thread."""
    self.flush()
    if self._thread is not None:
      self._queue.put(None)
      self._thread.join()
      self._thread = None

  def _report(self) -> None:
    if self._error is not None and not self._is_reported:
      self._is_reported = True
      text = f'the trace of choices ends: {self._error!r}'
      if jax.process_index():  # whose messages are not shown
        logging.error(text)
      else:
        self._message(text)

  def _work(self, writer: Writer) -> None:
    while (item := self._queue.get()) is not None:
      try:
        if self._error is None:
          self._write(writer, item)
      except Exception as error:
        self._error = error
      finally:
        if isinstance(item, threading.Event):
          item.set()

  def _write(self, writer: Writer, item: Any) -> None:
    if isinstance(item, threading.Event):
      writer.flush()
      return
    kind, step, number, batch, choices = item
    rows = {key: local.rows for key, local in batch.items()}
    if not any(map(len, rows.values())):
      return  # another process writes the same rows
    batch, choices = jax.tree.map(
      _Local.host,
      (batch, choices),
      is_leaf=lambda leaf: isinstance(leaf, _Local),
    )
    size = self._header.batch_size
    for record in records_of(self._model, kind, step, number, batch, choices):
      prefix = f'{record.sequence}_' if record.sequence else ''
      writer.add(record, rows[f'{prefix}tokens'], size)
