"""Rows of whole examples by index; several short examples may share a row."""

import abc
import collections
import operator

import numpy as np

from moe_jax.data.layouts import Example, Layout, Lengths
from moe_jax.data.packing import Batch, Numbers, Rows
from moe_jax.shapes import Int

# Number of unfinished rows that may still take an example. With 8, docstrings
# fill a fifth fewer rows than with 1; 64 would save another 3 %.
_OPEN_ROWS = 8
# Number of rows that are read to estimate the padding, to about one percent.
_ROWS_SAMPLED = 256
_SIDES = {'encoder': 'encoder_segment_ids', 'decoder': 'segment_ids'}


class ExampleRows(Rows):
  """Random access to rows of whole examples; no example spans two rows."""

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
    count = min(len(self), _ROWS_SAMPLED)
    batch = self.take(np.arange(count) * len(self) // max(count, 1))
    padding = ' and '.join(
      f'{np.mean(batch[name] == 0):.1%} of the {side}'
      for side, name in _SIDES.items()
      if name in batch
    )
    shape = self.layout.describe()
    return f'{len(self):,} rows of {shape}, padding {padding}'


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
