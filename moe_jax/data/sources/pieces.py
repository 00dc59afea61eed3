"""The contract of sources in pieces, which several processes read apart.

A source gives its `Texts` such pieces where one process would take long.
"""

import abc
from collections.abc import Iterator
from typing import NamedTuple


class Located(NamedTuple):
  """A document of a piece of a source.

  Attributes:
    split: 'train' or 'validation'.
    text: The document.
    read: Number of bytes of the piece that are read by now.
  """

  split: str
  text: str
  read: int


class Pieces(abc.ABC):
  """Documents in pieces that processes read apart; it can be pickled.

  Attributes:
    sizes: Number of bytes of each piece, where it comes from.
  """

  sizes: tuple[int, ...]

  @abc.abstractmethod
  def read(self, number: int) -> Iterator[Located]:
    """The documents of a piece, of both splits; the same at every call."""
