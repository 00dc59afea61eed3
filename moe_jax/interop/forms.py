"""Layouts of a tensor in a checkpoint and here, written in letters.

`'(H D) M -> M H D'` is a linear layer in PyTorch's layout, [out, in], whose
output has H heads of width D, and our layout of it. `'E (1/2 F) M -> E M F'`
takes block 1 of 2, the second half, of the second dimension, and
`'E M (F 0/2) -> E M F'` every second value of the third, from the first on.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_jax.errors import InputError
from moe_jax.interop.tensor_files import Index

_GROUP = re.compile(r'\(([^)]*)\)|(\S+)')


@dataclasses.dataclass(frozen=True)
class Form:
  """The layout of a tensor in a checkpoint ("theirs") and here ("ours").

  Attributes:
    theirs: The parts of each dimension of their tensor, outermost first; 'k/n'
      is block k of n.
    ours: The letters of our dimensions, in order.
  """

  theirs: tuple[tuple[str, ...], ...]
  ours: tuple[str, ...]

  @classmethod
  @functools.cache
  def parse(cls, text: str) -> 'Form':
    """Parses 'theirs -> ours'; without an arrow both layouts are equal."""
    their_text, _, our_text = text.partition('->')
    groups = [
      tuple((inside or alone).split())
      for inside, alone in _GROUP.findall(their_text)
    ]
    our_letters = tuple((our_text or their_text).split())
    letters = [part for group in groups for part in group if '/' not in part]
    if sorted(letters) != sorted(our_letters):
      raise InputError(f'form {text!r}: the two sides differ in their letters')
    return cls(tuple(groups), our_letters)

  def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of their tensor if ours has `shape`."""
    sizes = self._sizes(shape)
    return tuple(
      int(np.prod([sizes[part] for part in group])) for group in self.theirs
    )

  def read(
    self,
    read_slice: Callable[[Index], np.ndarray],
    shape: Sequence[int],
    index: Index,
  ) -> np.ndarray:
    """Reads a slice of our tensor, and only the necessary slice of theirs.

    Args:
      read_slice: Returns a copy of a slice of their tensor.
      shape: The shape of our whole tensor.
      index: The slice of each dimension of our tensor, with plain bounds.
    """
    sizes = self._sizes(shape)
    letter_bounds = {
      letter: (part.start, part.stop)
      for letter, part in zip(self.ours, index, strict=True)
    }
    bounds = {part: letter_bounds.get(part) or _block(part) for part in sizes}
    slices, split_shape, inner_index = [], [], []
    for group in self.theirs:
      first, *rest = group
      low, high = bounds[first]
      stride = int(np.prod([sizes[part] for part in rest], dtype=np.int64))
      slices.append(slice(low * stride, high * stride))
      split_shape += [high - low, *(sizes[part] for part in rest)]
      inner_index += [slice(None), *(slice(*bounds[part]) for part in rest)]
    part = read_slice(tuple(slices)).reshape(split_shape)[tuple(inner_index)]
    letters = [letter for group in self.theirs for letter in group]
    block_axes = tuple(i for i, letter in enumerate(letters) if '/' in letter)
    letters = [letter for letter in letters if '/' not in letter]
    axes = [letters.index(letter) for letter in self.ours]
    return part.squeeze(axis=block_axes).transpose(axes)

  @property
  def num_blocks(self) -> int:
    """The number of our tensors that are blocks of theirs."""
    parts = [part for group in self.theirs for part in group if '/' in part]
    return math.prod(int(part.split('/')[1]) for part in parts)

  def write(self, array: np.ndarray) -> np.ndarray:
    """Their contiguous tensor from our whole one, if it has no blocks."""
    letters = [letter for group in self.theirs for letter in group]
    axes = [self.ours.index(letter) for letter in letters]
    shape = self.their_shape(array.shape)
    return np.ascontiguousarray(array.transpose(axes)).reshape(shape)

  def write_block(self, tensor: np.ndarray, array: np.ndarray) -> None:
    """Writes our whole tensor into its block of their contiguous one."""
    sizes = self._sizes(array.shape)
    parts = [part for group in self.theirs for part in group]
    blocks = tensor.reshape([sizes[part] for part in parts])
    axes = [self.ours.index(part) for part in parts if '/' not in part]
    block = tuple(
      _block(part)[0] if '/' in part else slice(None) for part in parts
    )
    blocks[block] = array.transpose(axes)

  def _sizes(self, shape: Sequence[int]) -> Mapping[str, int]:
    sizes = dict(zip(self.ours, shape, strict=True))
    for group in self.theirs:
      sizes |= {part: int(part.split('/')[1]) for part in group if '/' in part}
    return sizes


def _block(part: str) -> tuple[int, int]:
  k = int(part.split('/')[0])
  return k, k + 1
