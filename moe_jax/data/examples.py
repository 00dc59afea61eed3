"""Rows of whole examples by index; several short examples may share a row."""

import abc
import collections
import operator

import numpy as np
from jaxtyping import Integer

from moe_jax.data.layouts import Counts, Example, Layout, Lengths, Window
from moe_jax.data.packing import Batch, Numbers, Rows
from moe_jax.shapes import Int

# Number of rows that may still take an example. With 8, docstrings fill a fifth
# fewer rows than with 1; 64 would save another 3 %.
_OPEN_ROWS = 8
# Number of rows that are read to estimate the padding, to about one percent.
_ROWS_SAMPLED = 256


class ExampleRows(Rows):
  """Random access to rows of whole examples, each in one row."""

  def __init__(self, lengths: Lengths, layout: Layout, *, pack: bool = True):
    """Decides which examples each row has: one, or with `pack` several.

    Every example has to fit a row of the layout.
    """
    self.layout: Layout = layout
    count = len(lengths.total)
    self._members, self._starts = np.arange(count), np.arange(count + 1)
    if pack:
      rows = packed(layout.sizes(lengths), layout.capacity)
      self._members = np.array([i for row in rows for i in row], np.int64)
      self._starts = np.cumsum([0, *map(len, rows)])

  def __len__(self) -> int:
    return len(self._starts) - 1

  @abc.abstractmethod
  def example(self, index: int, generator: np.random.Generator) -> Example:
    """Example `index`; its noise, if it has any, is drawn by `generator`."""

  def draw(self, indices: Numbers, seed: int, epochs: Numbers) -> Batch:
    """The rows at `indices`, each with the noise of its epoch."""
    rows = []
    for index, epoch in zip(indices.tolist(), epochs.tolist()):
      generator = np.random.default_rng([seed, epoch, index])
      members = self.members(index) if index < len(self) else []
      rows.append([self.example(i, generator) for i in members])
    return self.layout.assemble(rows)

  def members(self, row: int) -> list[int]:
    """The indices of the examples in a row."""
    begin, end = self._starts[row : row + 2]
    return self._members[begin:end].tolist()

  def describe(self) -> str:
    """The number and shape of the rows, and their share of padding."""
    padding = ' and '.join(
      f'{share:.1%} of the {side}' for side, share in self.padding().items()
    )
    shape = self.layout.describe()
    return f'{len(self):,} rows of {shape}, padding {padding}'

  def padding(self) -> dict[str, float]:
    """The share of padding on each side, 'encoder' or 'decoder'."""
    count = min(len(self), _ROWS_SAMPLED)
    batch = self.take(np.arange(count) * len(self) // max(count, 1))
    sides = {'encoder': 'encoder_segment_ids', 'decoder': 'segment_ids'}
    found = [side for side, name in sides.items() if name in batch]
    return {side: float(np.mean(batch[sides[side]] == 0)) for side in found}


def packed(
  sizes: Int[np.ndarray, 'P D'], capacity: tuple[int, ...]
) -> list[list[int]]:
  """Packs examples into rows; returns the indices of each row's examples.

  Each example in turn goes into the oldest of the last few rows that has room
  for the example, or begins a new row.

  Args:
    sizes: The size of each of P examples in D dimensions.
    capacity: The room of a row in each dimension; each example fits one.
  """
  rows: list[list[int]] = []
  open_rows = collections.deque(maxlen=_OPEN_ROWS)  # rows and the room left
  for i, size in enumerate(sizes.tolist()):
    fitting = (at for at in open_rows if all(map(operator.le, size, at[1])))
    row, room = next(fitting, ([], [*capacity]))
    if not row:
      rows.append(row)
      open_rows.append((row, room))
    row.append(i)
    room[:] = [left - n for n, left in zip(size, room)]
  return rows


class WindowTask(abc.ABC):
  """Turns a window of text into inputs and targets.

  Attributes:
    layout: Layout of the rows.
    window: Largest number of tokens of a window whose example always fits in a
      row.
  """

  layout: Layout
  window: int

  @abc.abstractmethod
  def lengths(self, n: Counts) -> Lengths:
    """The largest lengths of examples of windows of `n` tokens."""

  @abc.abstractmethod
  def __call__(self, window: Window, generator: np.random.Generator) -> Example:
    """One example of a window of 2 to `self.window` tokens."""


class DenoisedRows(ExampleRows):
  """Random access to rows of examples, one example of each window of a text.

  A window never spans documents: a document is cut into as few windows as the
  task allows, whose lengths differ by one token at most. Windows of one token
  are left out, since one side would be empty.
  """

  def __init__(
    self,
    tokens: Integer[np.ndarray, ' N'],
    starts: Integer[np.ndarray, ' D'],
    task: WindowTask,
    *,
    pack: bool = True,
  ):
    """Wraps a stream of tokens, as `PackedRows` does, without copying it.

    Without `pack`, windows of short documents have rows of their own.
    """
    self._tokens, self._task = tokens, task
    self._bounds = windows(starts, len(tokens), task.window)
    lengths = task.lengths(self._bounds[:, 1] - self._bounds[:, 0])
    super().__init__(lengths, task.layout, pack=pack)

  def example(self, index: int, generator: np.random.Generator) -> Example:
    """The example of window `index`."""
    begin, end = self._bounds[index]
    return self._task(self._tokens[begin:end], generator)


def windows(
  starts: Integer[np.ndarray, ' D'], total: int, longest: int
) -> Int[np.ndarray, 'P 2']:
  """The begin and end of each window of 2 to `longest` tokens.

  Documents begin at `starts` and have `total` tokens in all.
  """
  length = np.diff(starts, append=total)
  count = -(-length // longest)
  document = np.repeat(np.arange(len(starts)), count)
  k = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
  length, count = length[document], count[document]
  bounds = np.stack([k, k + 1], axis=1) * length[:, None] // count[:, None]
  bounds = bounds + np.asarray(starts)[document][:, None]
  return bounds[bounds[:, 1] - bounds[:, 0] > 1]
