"""Rows of whole examples by index; several short examples may share a row."""

import abc
import collections
import dataclasses

import numpy as np

from moe_jax.data.layouts import Example, Layout, Lengths
from moe_jax.data.packing import Rows
from moe_jax.errors import InputError
from moe_jax.shapes import Int

# Number of rows that may still take an example. With 8, docstrings fill a fifth
# fewer rows than with 1; 64 would save another 3 %.
_OPEN_ROWS = 8
# Number of rows that are read to estimate the padding, to about one percent.
_ROWS_SAMPLED = 256


class ExampleRows(Rows):
  """Random access to rows of whole examples, each in one row."""

  def __init__(self, lengths: Lengths, layout: Layout, *, pack: bool = True):
    """Decides which examples each row has.

    Args:
      lengths: Lengths of all examples.
      layout: Layout of the rows, which every example fits.
      pack: Whether examples share rows; if not, each has its own.
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

  def draw(
    self,
    indices: Int[np.ndarray, ' B'],
    seed: int,
    epochs: Int[np.ndarray, ' B'],
  ) -> dict[str, np.ndarray]:
    """The rows at `indices`, each with the noise of its epoch."""
    rows = []
    for index, epoch in zip(indices.tolist(), epochs.tolist()):
      generator = np.random.default_rng([seed, epoch, index])
      inside = index < len(self)
      members = self.members(index) if inside else []
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
    return {
      side: float(np.mean(batch[name] == 0))
      for side, name in (
        ('encoder', 'encoder_segment_ids'),
        ('decoder', 'segment_ids'),
      )
      if name in batch
    }


def packed(
  sizes: Int[np.ndarray, 'P D'], capacity: tuple[int, ...]
) -> list[list[int]]:
  """The indices of the examples of each row.

  Each example in turn goes into the oldest of the last few rows that has room
  for it, or begins a new row.

  Args:
    sizes: The size of each of P examples in D dimensions.
    capacity: The room of a row in each dimension.

  Raises:
    ValueError: An example is larger than a row.
  """
  if (sizes > np.array([capacity])).any():
    raise InputError(
      f'examples of sizes up to {sizes.max(0)} do not fit rows of {capacity}'
    )
  rows, open_rows = [], collections.deque(maxlen=_OPEN_ROWS)
  for i, size in enumerate(sizes.tolist()):
    for row in open_rows:
      room_left = [room - n for room, n in zip(row.room, size)]
      if min(room_left) >= 0:
        row.room = room_left
        row.members.append(i)
        break
    else:
      room = [room - n for room, n in zip(capacity, size)]
      open_rows.append(_Row(room, [i]))
      rows.append(open_rows[-1].members)
  return rows


@dataclasses.dataclass
class _Row:
  """A row that may still take examples, and the room left in it."""

  room: list[int]
  members: list[int]
