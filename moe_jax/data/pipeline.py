"""The stream of batches: a pure function of the batch number.

Not here: rows (`packing.py`), and putting batches on devices.
"""

from collections.abc import Iterator

import grain
import numpy as np

from moe_jax.data.packing import Rows

Batch = dict[str, np.ndarray]

_MOST_ROWS = 2**32  # grain's shuffle takes a larger number modulo this

# grain's endless repeat overflows when it is cut into batches of one row; this
# many rows are as good as endless.
_ENDLESS_ROWS = 2**52

# One batch is assembled while the one before is trained on; the rest is slack
# for a step that is shorter than the one before.
_PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def batch_dataset(
  rows: Rows,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """An endless dataset whose element i is batch i, arrays [B / n, T].

  Rows are shuffled anew each epoch; each epoch has every row once, and a batch
  may span two epochs. A row's noise is its epoch's own. `PackedRows` have
  none: from the second epoch on, their stream is cut elsewhere, at an offset
  below T of the epoch's own, so that a token does not meet the same context
  again. Process p of n gets rows p*B/n to (p+1)*B/n of the batch, so the
  global batch does not depend on n.

  Args:
    rows: What to draw from.
    batch_size: B, global.
    seed: Any integer of at least 0.
    process_index: p.
    process_count: n.

  Raises:
    ValueError: B is not a positive multiple of n, p is not below n, the seed
      is negative, or there are no rows or more than 2^32.
  """
  share = _share(batch_size, process_index, process_count)
  if seed < 0:
    raise ValueError(f'seed={seed} is negative')
  if not 0 < len(rows) <= _MOST_ROWS:
    raise ValueError(f'{len(rows)} rows not in [1, {_MOST_ROWS}]')
  # grain shuffles epoch e with seed + e: neighbouring seeds would see the same
  # orders, one epoch apart.
  spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
  return (
    grain.MapDataset.range(len(rows))
    .shuffle(spread)
    .repeat(_ENDLESS_ROWS // len(rows))
    .map_with_index(lambda i, row: (row, i // len(rows)))
    .batch(share)
    .slice(slice(process_index, None, process_count))
    .map(lambda drawn: rows.draw(drawn[0], spread, drawn[1]))
  )


def train_batches(
  rows: Rows,
  *,
  batch_size: int,
  seed: int,
  start: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Batches `start`, `start` + 1, ... of `batch_dataset`, without end.

  They are assembled in the background; an error there is raised by `next`,
  after which the iterator is at its end.

  Raises:
    ValueError: As `batch_dataset`, or `start` is negative.
  """
  if start < 0:
    raise ValueError(f'start={start} is negative')
  batches = batch_dataset(
    rows,
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  ).slice(slice(start, None))
  return _until_error(iter(batches.to_iter_dataset(_PREFETCH)))


def eval_batches(
  rows: Rows,
  *,
  batch_size: int,
  num_batches: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Every row once, in order; the last batch is filled up with padding.

  Args:
    rows: What to evaluate on.
    batch_size: B, global; each process gets arrays [B / n, T].
    num_batches: 0 for all; else this many, spread evenly over all and the
      same at every call (all, where there are fewer).
    process_index: As in `batch_dataset`.
    process_count: As in `batch_dataset`.

  Raises:
    ValueError: As `batch_dataset`, or `num_batches` is negative.
  """
  share = _share(batch_size, process_index, process_count)
  if num_batches < 0:
    raise ValueError(f'num_batches={num_batches} is negative')
  total = -(-len(rows) // batch_size)
  mine = process_index * share + np.arange(share)
  return (rows.take(i * batch_size + mine) for i in spread(total, num_batches))


def spread(total: int, count: int) -> list[int]:
  """`count` indices below `total`, spread evenly; 0: all, as where fewer."""
  taken = min(count, total) or total
  return [i * total // taken for i in range(taken)]


def _share(batch_size: int, process_index: int, process_count: int) -> int:
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index={process_index} not in [0, process_count={process_count})'
    )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'batch_size={batch_size} is not a positive multiple of '
      f'process_count={process_count}'
    )
  return batch_size // process_count


def _until_error(iterator: grain.DatasetIterator) -> Iterator[Batch]:
  # grain's iterator would go on after an error with the batch that follows; a
  # generator ends there.
  yield from iterator
