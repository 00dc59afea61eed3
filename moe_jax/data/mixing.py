"""The order in which rows of several sources follow each other.

A period of rows is laid out once. Which source gives row p of the stream, and
which of the source's rows that is, follows from the quotient and the remainder
of p divided by the length of the period.
"""

from collections.abc import Callable, Mapping

import numpy as np

from moe_jax.data.packing import Batch, Numbers, Rows
from moe_jax.errors import InputError
from moe_jax.shapes import Int


def whole_counts(weights: Mapping[str, float], period: int) -> dict[str, int]:
  """The number of rows of each source in a period, by largest remainders.

  Weights need not sum to one.

  Raises:
    ValueError: A weight is below 0, or all are 0; or the period is so short
      that a source whose weight is above 0 has no row in it.
  """
  weight_array = np.array([*weights.values()], np.float64)
  if not len(weight_array) or weight_array.min() < 0 or not weight_array.sum():
    raise InputError(
      f'weights={dict(weights)} must each be at least 0, and '
      'one of them above 0'
    )
  exact_counts = weight_array / weight_array.sum() * period
  counts = np.floor(exact_counts + 1e-9).astype(np.int64)
  # If remainders are equal, that of the first source counts as the largest.
  order = np.argsort(-(exact_counts - counts), kind='stable')
  counts[order[: period - counts.sum()]] += 1
  by_name = dict(zip(weights, counts.tolist()))
  empty = [name for name in weights if weights[name] and not by_name[name]]
  if empty:
    share = weights[empty[0]] / weight_array.sum()
    raise InputError(
      f'period={period} has no row of {len(empty)} sources with a weight, such '
      f'as {empty[0]!r} with a share of {share:.2g}; take a longer period'
    )
  return by_name


class Schedule:
  """The source of each row of an endless stream, and the row's index there.

  The rows of every source are spread evenly: after any number of rows, each of
  n sources is at most 1 - 1 / (2n - 2) rows from its share (Tijdeman 1980, The
  chairman assignment problem). With counts (3, 1):

      row of the stream    0    1    2    3    4    5    6    7
      source, its row     a 0  a 1  b 0  a 2  a 3  a 4  b 1  a 5

  Attributes:
    counts: Number of rows of each source in a period.
    source: int [period], the source of each row of a period.
    rank: int [period], the number of earlier rows of the same source in the
      period.
  """

  def __init__(self, counts: Int[np.ndarray, ' P']):
    """Takes the number of rows of each of P sources in a period."""
    counts = np.asarray(counts, np.int64)
    length, slack = int(counts.sum()), max(2 * np.count_nonzero(counts) - 2, 1)
    source, rank = np.zeros((2, length), np.int64)
    rows_so_far = np.zeros_like(counts)
    # The next row is of the source that must come soonest, among the sources
    # whose share has come up; of equally urgent sources the first is taken.
    # Equal ratios are equal floats, so that every machine has the same order.
    for row in range(length):
      due = slack * (counts * (row + 1) - length * rows_so_far) >= length
      last = (slack * (rows_so_far + 1) - 1) / np.maximum(counts, 1)
      p = int(np.argmin(np.where(due, last, np.inf)))
      source[row], rank[row] = p, rows_so_far[p]
      rows_so_far[p] += 1
    self.counts, self.source, self.rank = counts, source, rank

  def __call__(self, row: Numbers) -> tuple[Numbers, Numbers]:
    """The index of each row's source, and the row's index in the source.

    `row` has indices of rows in the endless stream.
    """
    period, offset = np.divmod(np.asarray(row, np.int64), len(self.source))
    source = self.source[offset]
    return source, period * self.counts[source] + self.rank[offset]


class TaskRows(Rows):
  """The rows of one source of a mixture, with the source's index as task id.

  A batch also has `task_ids` int32 [B, T], the task id at every token, and
  `encoder_task_ids` where the batch has an encoder's side.

  Attributes:
    source: The rows without their task ids.
  """

  def __init__(self, rows: Rows, task: int):
    """Takes the rows of the source and its index, from 0."""
    self.source, self.layout, self._task = rows, rows.layout, task

  def __len__(self) -> int:
    return len(self.source)

  def draw(self, indices: Numbers, seed: int, epochs: Numbers) -> Batch:
    batch = self.source.draw(indices, seed, epochs)
    return batch | {
      name.replace('segment', 'task'): np.full_like(values, self._task)
      for name, values in batch.items()
      if name.endswith('segment_ids')
    }

  def describe(self) -> str:
    return self.source.describe()


class MixedRows(Rows):
  """The rows of several sources, which are mixed in training.

  The rows by index, which evaluations read, are all rows of the first source,
  then all rows of the second, and so on. The stream of training follows the
  schedule.
  """

  def __init__(self, parts: Mapping[str, Rows], schedule: Schedule):
    """Takes each source's rows, all of one task and shape, and their order."""
    self.parts, self._schedule = parts, schedule
    self._ends = np.cumsum([len(rows) for rows in parts.values()])
    self.layout = next(iter(parts.values())).layout  # the same for all sources

  def locate(self, row: Numbers) -> tuple[Numbers, Numbers]:
    return self._schedule(row)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def draw(self, indices: Numbers, seed: int, epochs: Numbers) -> Batch:
    """The rows at `indices`, counted from the first source to the last.

    What a task draws for a row at random follows from `seed` and its epoch.
    """
    indices = np.asarray(indices, np.int64)
    # Rows beyond the last are padding, which the last source gives.
    source = np.searchsorted(self._ends[:-1], indices, side='right')
    row = indices - np.append(0, self._ends)[source]
    sources = [*self.parts.values()]
    return joined(
      source,
      lambda p, chosen: sources[p].draw(row[chosen], seed, epochs[chosen]),
    )

  def describe(self) -> str:
    """The number of rows and of sources."""
    return f'{len(self):,} rows of {len(self.parts)} sources'


def joined(source: Numbers, draw: Callable[[int, Numbers], Batch]) -> Batch:
  """A batch whose rows come from several sources.

  Args:
    source: The index of the source of each row.
    draw: Function from the index of a source and the indices of its rows in
      the batch to a batch of these rows alone.

  Returns:
    The batch's arrays by name, [R, ...] each, with R rows in the order of
    `source`.
  """
  batch: Batch = {}
  sources = np.unique(source).tolist()
  if len(sources) == 1:
    return draw(sources[0], np.arange(len(source)))
  for p in sources:
    chosen = np.flatnonzero(source == p)
    for name, values in draw(p, chosen).items():
      if name not in batch:
        batch[name] = np.zeros((len(source), *values.shape[1:]), values.dtype)
      batch[name][chosen] = values
  return batch
