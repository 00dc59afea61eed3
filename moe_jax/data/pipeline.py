"""The stream of batches, each of which is a pure function of its index."""

import hashlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import grain
import numpy as np
from grain.experimental import index_shuffle

from moe_jax.data.mixing import joined
from moe_jax.data.packing import Batch, Numbers, Rows
from moe_jax.errors import InputError, ReportedError

_MOST_ROWS = 2**32  # grain's shuffle takes a larger number modulo this

# No run ever draws so many rows.
_ENDLESS_ROWS = 2**52

# Number of batches that are assembled in advance. One batch would be enough if
# all steps took equally long.
_PREFETCHED = 4
T = TypeVar('T')


def batch_dataset(
  rows: Rows,
  *,
  batch_size: int,
  seed: int,
  share: Numbers | None = None,
  offset: int = 0,
) -> grain.MapDataset:
  """An endless dataset whose element i is batch i, arrays [R, T].

  Rows are shuffled anew each epoch; each epoch has every row once, and a batch
  may span two epochs. A row has different noise in each epoch. `PackedRows`
  have no noise, but from the second epoch on their stream is read in a circle
  from an offset below T that depends on the epoch, so that a token does not
  meet the same context again; a stream that fits one row stays as it is. Which
  rows a batch has does not depend on `share`. In a mixture, each source is
  shuffled by itself, and has epochs of its own.

  Args:
    rows: Rows to draw from.
    batch_size: Global number B of rows in a batch.
    seed: Integer of at least 0 that decides the order and the noise.
    share: Indices, from 0, of the R rows of each batch that are read; None
      reads all rows, R = B.
    offset: Index, in the stream, of the row that batch 0 begins with. It is
      negative where earlier batches, which must not be read then, were smaller
      than B.

  Raises:
    ValueError: There are no rows, or more than 2^32.
  """
  share = np.arange(batch_size) if share is None else share
  streams = [_stream(part, seed, name) for name, part in rows.parts.items()]

  def draw(i: int) -> Batch:
    source, row = rows.locate(offset + i * batch_size + share)
    return joined(source, lambda p, chosen: streams[p](row[chosen]))

  return grain.MapDataset.range(_ENDLESS_ROWS // batch_size).map(draw)


def _stream(rows: Rows, seed: int, name: str) -> Callable[[Numbers], Batch]:
  """A function from indices in one source's endless stream to the rows there.

  The stream is shuffled anew each epoch. `name` is the source's, '' without a
  mixture. No rows, or more than 2^32, raise a ValueError.
  """
  if not 0 < len(rows) <= _MOST_ROWS:
    of_source = f' of source {name!r}' * bool(name)
    raise InputError(f'{len(rows)} rows{of_source} not in [1, {_MOST_ROWS}]')
  # Epoch e is shuffled with stream_seed + e. `seed` is hashed, as neighbouring
  # seeds would have the same orders, one epoch apart. The order of a source in
  # a mixture depends on its own name alone, not on the other sources.
  name_seed = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])]
  sequence = np.random.SeedSequence([seed, *name_seed] if name else seed)
  stream_seed = int(sequence.generate_state(1)[0])

  def draw(row: Numbers) -> Batch:
    epochs, positions = np.divmod(row, len(rows))
    # `index_shuffle` with 4 rounds gives the order of
    # `grain.MapDataset.shuffle`, which takes twice as long for each row.
    pairs = zip(positions.tolist(), epochs.tolist())
    indices = [
      index_shuffle(position, len(rows) - 1, (stream_seed + epoch) % 2**32, 4)
      for position, epoch in pairs
    ]
    return rows.draw(np.array(indices, np.int64), stream_seed, epochs)

  return draw


def train_batches(
  rows: Rows,
  *,
  batch_size: int,
  seed: int,
  start: int,
  share: Numbers | None = None,
  offset: int = 0,
) -> Iterator[Batch]:
  """Batches `start`, `start` + 1, ... of `batch_dataset`, without end.

  The batches are assembled in the background, each of `batch_size` rows in all.
  `share` has the indices of the rows of each batch that are read, or is None
  for all rows. `offset` is the index, in the stream, of the row with which
  batch 0 would begin.

  Raises:
    ValueError: There are no rows or more than 2^32, or the index of the first
      row that is read is negative.
    DataError: A batch could not be made; `next` raises it, and the iterator
      then ends.
  """
  if (first := offset + start * batch_size) < 0:
    raise InputError(f'batch {start} would begin with row {first}')
  batches = batch_dataset(
    rows, batch_size=batch_size, seed=seed, share=share, offset=offset
  )
  elements = (cast(Batch, batches[i]) for i in itertools.count(start))
  return ahead(elements, first=start, most=_PREFETCHED)


def eval_batches(
  rows: Rows,
  *,
  batch_size: int,
  num_batches: int = 0,
  share: Numbers | None = None,
) -> Iterator[Batch]:
  """Batches of every row once, in order; padding fills up the last batch.

  The batches are assembled in the background.

  Args:
    rows: Rows to evaluate on.
    batch_size: Global number B of rows in a batch.
    num_batches: Number of batches, spread evenly over all batches and the same
      at every call; 0, or more than there are, takes all.
    share: Indices, from 0, of the R rows of each batch that are read, which
      gives arrays [R, T]; None reads all rows, R = B.

  Raises:
    DataError: A batch could not be made; `next` raises it, and the iterator
      then ends.
  """
  share = np.arange(batch_size) if share is None else share
  total = -(-len(rows) // batch_size)
  numbers = spread(total, num_batches)
  batches = (rows.take(i * batch_size + share) for i in numbers)
  return ahead(batches, first=0, most=_PREFETCHED)


def spread(total: int, count: int) -> list[int]:
  """`count` indices below `total`, spread evenly.

  If `count` is 0 or above `total`, the result is all indices.
  """
  num_taken = min(count, total) or total
  return [i * total // num_taken for i in range(num_taken)]


class DataError(ReportedError, RuntimeError):
  """A batch could not be made; the text names the batch and the reason."""


def ahead(source: Iterator[T], *, first: int, most: int) -> Iterator[T]:
  """The elements of `source`, which a thread makes in advance.

  The thread begins with the first `next` and ends with the iterator. Unlike
  grain's own prefetching, the iterator never waits for a thread that has ended,
  as the thread puts None into the queue at its end, whatever ends it.

  Args:
    source: Iterator that only the thread uses.
    first: Number of the first element of `source`, for messages.
    most: Largest number of elements that are made in advance; at least 1.

  Raises:
    DataError: `source` raised an exception; `next` raises it, and the iterator
      then ends.
  """
  elements: queue.Queue[tuple[T] | None] = queue.Queue(most)
  closed = threading.Event()
  failures: list[BaseException] = []

  def work():
    try:
      for element in source:
        elements.put((element,))
        if closed.is_set():
          return
    except BaseException as error:  # SystemExit, too, must not end the thread
      failures.append(error)
    finally:
      if not closed.is_set():
        elements.put(None)

  thread = threading.Thread(target=work, name='batches', daemon=True)
  thread.start()
  number = first
  try:
    while (element := elements.get()) is not None:
      yield element[0]
      number += 1
    for error in failures:
      raise DataError(
        f'batch {number} could not be made: {type(error).__name__}: {error}'
      ) from error
  finally:
    closed.set()
    while not elements.empty():  # the thread may be waiting for room
      elements.get_nowait()
