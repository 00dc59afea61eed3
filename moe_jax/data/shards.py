"""Tokens in several files, read as one array."""

import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from moe_jax.errors import InputError
from moe_jax.shapes import Int

# Maps that a process holds open, each with a file descriptor.
_MOST_OPEN = 256


class Shards:
  """A stream of tokens in several files, each mapped when it is first read.

  It has what rows need of an array [N]: `len`, `shape`, `dtype`, slices, and
  indexing by integers and arrays of them.

  Attributes:
    dtype: Type of the tokens.
    shape: (N,).
  """

  ndim = 1

  def __init__(
    self, paths: Sequence[pathlib.Path], dtype: str, counts: Sequence[int]
  ):
    """Takes the files, in order, and the number of tokens in each."""
    if not paths or len(paths) != len(counts) or min(counts) < 1:
      raise InputError(f'{len(paths)} files of {list(counts)} tokens')
    self.dtype = np.dtype(dtype)
    self._paths = list(paths)
    self._ends = np.cumsum(counts)
    self._begins = self._ends - counts
    self.shape = (int(self._ends[-1]),)
    self._file = functools.lru_cache(maxsize=_MOST_OPEN)(self._map)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(
    self, index: int | np.integer | slice | np.ndarray
  ) -> np.ndarray:
    if isinstance(index, slice):
      begin, end, step = index.indices(len(self))
      if step == 1:
        return self._stretch(begin, end)
      index = np.arange(begin, end, step)
    index = np.asarray(index)
    flat = index.reshape(-1).astype(np.int64)
    flat = np.where(flat < 0, flat + len(self), flat)
    if flat.size and not 0 <= flat.min() <= flat.max() < len(self):
      raise IndexError(f'{flat.min()} to {flat.max()} of {len(self)} tokens')
    return self._gathered(flat).reshape(index.shape)

  def _stretch(self, begin: int, end: int) -> np.ndarray:
    """The tokens of [begin, end)."""
    if begin >= end:
      return np.zeros(0, self.dtype)
    first = int(np.searchsorted(self._ends, begin, side='right'))
    last = int(np.searchsorted(self._ends, end - 1, side='right'))
    return np.concatenate(
      [
        self._file(i)[max(begin - start, 0) : end - start]
        for i in range(first, last + 1)
        for start in [int(self._begins[i])]
      ]
    )

  def _gathered(self, flat: Int[np.ndarray, ' N']) -> np.ndarray:
    """The tokens at these indices, file by file."""
    file = np.searchsorted(self._ends, flat, side='right')
    tokens = np.empty(flat.size, self.dtype)
    # Sorting small integers takes a fraction of a pass for each file.
    small = file.astype(np.uint16 if len(self._paths) < 2**16 else np.int64)
    order = np.argsort(small, kind='stable')
    files, cuts = np.unique(file[order], return_index=True)
    for i, chosen in zip(files.tolist(), np.split(order, cuts[1:])):
      offsets = (flat[chosen] - self._begins[i]).astype(np.int64)
      tokens[chosen] = self._file(i)[offsets]
    return tokens

  def _map(self, number: int) -> np.ndarray:
    count = int(self._ends[number] - self._begins[number])
    path = self._paths[number]
    size = self.dtype.itemsize * count
    if not path.is_file() or path.stat().st_size != size:
      raise InputError(
        f'{path} is missing or not of its {size} bytes; delete {path.parent}, '
        'and it is made anew'
      )
    # A plain array over the map, as indexing a np.memmap gives memmaps.
    return np.asarray(np.memmap(path, self.dtype, mode='r', shape=(count,)))
