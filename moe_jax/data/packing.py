"""Rows by index: a stream of documents that is cut, or rows of whole examples.

`PackedRows` concatenates documents in order and cuts the stream every T tokens,
so that a row is found by its index alone. Several short examples may share a
row of `ExampleRows`.
"""

import abc
import collections
import functools
import operator
from collections.abc import Mapping

import numpy as np

from moe_jax.data.layouts import Example, Layout, Lengths
from moe_jax.shapes import Int

# Number of unfinished rows that may still take an example. With 8, docstrings
# fill a fifth fewer rows than with 1; 64 would save another 3 %.
_OPEN_ROWS = 8
# Number of rows that are read to estimate the padding, to about one percent.
_ROWS_SAMPLED = 256
_SIDES = {'encoder': 'encoder_segment_ids', 'decoder': 'segment_ids'}
Batch = dict[str, np.ndarray]
Numbers = Int[np.ndarray, ' R']  # indices of rows, or their epochs


class Rows(abc.ABC):
  """Random access to rows of tokens; a batch stacks rows.

  A row is a dict of arrays by name.

  Attributes:
    layout: Layout of the examples; None for rows that hold no examples.
  """

  layout: Layout | None = None

  # A subclass may set this attribute itself, in place of the property.
  @functools.cached_property
  def parts(self) -> Mapping[str, 'Rows']:
    """The rows of each source by name, which is '' where there is no mixture.

    Training shuffles the rows of each source by themselves.
    """
    return {'': self}

  def locate(self, row: Numbers) -> tuple[Numbers, Numbers]:
    """The index of each training row's source, and of the row in its source.

    Args:
      row: Indices of rows in the stream of training, from 0.
    """
    return np.zeros_like(row), row

  @abc.abstractmethod
  def __len__(self) -> int: ...

  def take(self, indices: Numbers) -> Batch:
    """The rows at `indices` [B] as one batch, a dict of arrays [B, T].

    The rows are the same at every call, as an evaluation needs. An index of
    `len(self)` or more gives a row of padding.
    """
    indices = np.asarray(indices)
    return self.draw(indices, 0, np.zeros_like(indices))

  @abc.abstractmethod
  def draw(self, indices: Numbers, seed: int, epochs: Numbers) -> Batch:
    """The batch of the rows at `indices`, with the noise of their `epochs`.

    The noise is what a task draws at random, such as which spans of a text are
    cut out. A row depends on its index, its epoch (from 0) and the seed alone.
    An index of `len(self)` or more gives a row of padding.
    """

  @abc.abstractmethod
  def describe(self) -> str:
    """Text on the number and shape of the rows."""

  def counts(self) -> dict[str, int]:
    """Counts to report about the rows by name, besides tokens and texts."""
    return {}

  def __getitem__(self, index: int) -> Batch:
    row = operator.index(index)
    if not -len(self) <= row < len(self):
      raise IndexError(f'row {row} of {len(self)}')
    batch = self.take(np.array([row % len(self)]))
    return {name: values[0] for name, values in batch.items()}


class PackedRows(Rows):
  """Random access to packed rows; row r reads the T + 1 tokens r T to r T + T.

  A row is a dict of arrays [T]:

  - `tokens` int32: the inputs; 0 for padding.
  - `targets` int32: the next token of the stream; 0 where there is none.
  - `segment_ids` int32: the number, in the row, of the token's document, from
    1; 0 for padding.
  - `positions` int32: from 0 at a document's first token in the row.
  - `loss_weights` float32: 1 where the target belongs to the token's own
    document; 0 at a document's last token and for padding.

  Only the last row can hold padding.
  """

  def __init__(self, tokens: np.ndarray, starts: np.ndarray, seq_len: int):
    """Wraps a stream, which may be memory-mapped, without copying it.

    Args:
      tokens: Unsigned or signed integers [N], the documents one after another.
      starts: Integers [D], the index at which each document begins: 0, then
        strictly rising (no document is empty).
      seq_len: Length T of a row.
    """
    self.tokens = tokens
    self.starts = starts
    self.seq_len = seq_len

  def __len__(self) -> int:
    # The stream's last token is only ever a target, hence the 1.
    return -(-(len(self.tokens) - 1) // self.seq_len)

  def describe(self) -> str:
    """The number of rows and their length: `7 rows of T=4`."""
    return f'{len(self):,} rows of T={self.seq_len}'

  def draw(self, indices: Numbers, seed: int, epochs: Numbers) -> Batch:
    """The rows at `indices`, cut at other tokens in each epoch after the first.

    The first row of such an epoch begins at an offset below T, which follows
    from seed and epoch, and the last rows wrap around the end of the stream. So
    all tokens are used, and only the token at the offset is never predicted.
    The only row of a short stream is the same in every epoch.
    """
    if len(self) <= 1:  # a cut could only take context away
      return self.take(indices)
    distinct, epoch_index = np.unique(epochs, return_inverse=True)
    draws = [
      epoch and np.random.SeedSequence([seed, epoch]).generate_state(1)[0]
      for epoch in distinct.tolist()
    ]
    offsets = np.array(draws, np.int64) % self.seq_len
    return self.take(indices, offsets[epoch_index])

  def take(self, indices: Numbers, offsets: Numbers | int = 0) -> Batch:
    """The rows at `indices` [B] as one batch, a dict of arrays [B, T].

    An index of `len(self)` or more gives a row of padding.

    Args:
      indices: Indices of rows, from 0.
      offsets: Numbers of tokens in [0, T), [B] or a single number, by which a
        row begins later in the stream. The tokens before the offset then follow
        the stream's end, as documents of their own.
    """
    N, T = len(self.tokens), self.seq_len
    row = np.asarray(indices, np.int64)[:, None]  # [B, 1]
    place = row * T + np.arange(T + 1)  # [B, T+1]
    # A row beyond the last may begin at the stream's last token.
    real = (place < N) & (row < len(self))
    place += np.reshape(np.asarray(offsets, np.int64), (-1, 1))
    lap, index = np.divmod(place, N)
    stream = self.tokens[index] * real
    document = np.searchsorted(self.starts, index, side='right')  # from 1
    start = np.maximum(self.starts[document - 1] + lap * N, place[:, :1])
    document += lap * len(self.starts)
    segment = (document - document[:, :1] + 1) * real
    learned = real[:, 1:] & (document[:, 1:] == document[:, :-1])
    return {
      'tokens': stream[:, :-1].astype(np.int32),
      'targets': stream[:, 1:].astype(np.int32),
      'segment_ids': segment[:, :-1].astype(np.int32),
      'positions': ((place - start) * real)[:, :-1].astype(np.int32),
      'loss_weights': learned.astype(np.float32),
    }


class ExampleRows(Rows):
  """Random access to rows of whole examples; no example spans two rows."""

  def __init__(self, lengths: Lengths, layout: Layout, *, pack: bool = True):
    """Decides which examples each row has: one, or with `pack` several.

    `lengths` are those of all examples, by index; each has to fit a row.
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
    """The number and shape of the rows, and an estimate of their padding."""
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
