"""The contract of sources, which give texts, pairs of texts, or both.

A source's options open its `Texts` or `Pairs`; a task reads one of the two.
Either has two splits, 'train' and 'validation', and an identity that changes
with the content of the splits.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple

from moe_jax.config import Options, unknown
from moe_jax.data import store, urls
from moe_jax.data.store import DOCUMENTS, PAIRS, SPLITS
from moe_jax.devices import cache_root
from moe_jax.errors import InputError

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Selection:
  """The splits of a source that are read, and the folder of prepared data.

  Attributes:
    splits: The source's own names of the splits that are taken for 'train' and
      'validation'. TFDS sources, as well as python_stdlib and its docstrings,
      take any split expression, such as 'train[90%:]'.
    cache_dir: Folder of prepared data; '' is the one that
      `moe_jax.devices.cache_root` names. What lies in a folder at a URL is
      copied there first.
    cache_digests: Whether large files of prepared data are read through before
      use, to check their digests.
  """

  splits: tuple[str, str] = SPLITS
  cache_dir: str = ''
  cache_digests: bool = True

  def name_of(self, split: str) -> str:
    """The source's own name of the split 'train' or 'validation'."""
    return self.splits[SPLITS.index(split)]

  @property
  def cache(self) -> pathlib.Path:
    """The folder of this machine that has prepared data."""
    return cache_root('' if urls.is_url(self.cache_dir) else self.cache_dir)

  def url(self, *names: str) -> str:
    """The URL of a folder within `cache_dir`; '' where it is no URL."""
    is_url = urls.is_url(self.cache_dir)
    return '/'.join([self.cache_dir.rstrip('/'), *names]) if is_url else ''

  def check_splits(self, source: str) -> None:
    """Raises ValueError unless both splits are 'train' or 'validation'."""
    for split in self.splits:
      if split not in SPLITS:
        raise unknown(f'split of {source}', split, SPLITS)


class Pieces(abc.ABC):
  """Texts in pieces that processes read independently; can be pickled.

  Attributes:
    sizes: Number of bytes of each piece in the files that it is read from.
  """

  sizes: tuple[int, ...]

  @abc.abstractmethod
  def read(self, number: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The split and the text, or the pair of texts, of all that a piece has.

    They are the same, in the same order, at every call.
    """


class OnePiece(Pieces):
  """Texts in a single piece, which has one split after the other."""

  sizes = (0,)

  def __init__(self, entries: Callable[[str], Iterator[tuple[str, ...]]]):
    """Takes a function from a split to its texts or pairs."""
    self._entries = entries

  def read(self, number: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The texts of both splits."""
    del number
    return (
      (split, entry) for split in SPLITS for entry in self._entries(split)
    )


@dataclasses.dataclass(frozen=True)
class Texts:
  """Documents in two splits.

  Attributes:
    name: Description of the source for messages.
    identity: Text that is equal only for equal documents in equal order; that
      of a TFDS dataset is found without a pass over the documents.
    texts: Function from 'train' or 'validation' to an iterator over the texts,
      which begins anew at each call and has the same order.
    pieces: The same documents in pieces, for several processes; None where one
      process tokenizes them all.
  """

  streams: ClassVar[tuple[str, ...]] = DOCUMENTS

  name: str
  identity: str
  texts: Callable[[str], Iterator[str]]
  pieces: Pieces | None = None

  def in_pieces(self) -> Pieces:
    """The documents in pieces, at least one."""
    return self.pieces or OnePiece(
      lambda split: ((text,) for text in self.texts(split))
    )

  def read(self, folder: pathlib.Path, split: str) -> store.Stream:
    """The stream of tokens in a folder of this source's tokens."""
    return store.read_stream(folder, split, *self.streams)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Pairs of inputs and targets in two splits.

  Attributes:
    name: Description of the source for messages.
    identity: Text that is equal only for equal pairs in equal order; that of a
      TFDS dataset is found without a pass over the pairs.
    pairs: Function from 'train' or 'validation' to an iterator over (inputs,
      targets), which begins anew at each call and has the same order.
  """

  streams: ClassVar[tuple[str, ...]] = PAIRS

  name: str
  identity: str
  pairs: Callable[[str], Iterator[Pair]]

  def texts(self, split: str) -> Iterator[str]:
    """Every text of a split, for tokenizers that are fitted to them."""
    return (text for pair in self.pairs(split) for text in pair)

  def in_pieces(self) -> Pieces:
    """The pairs in a single piece."""
    return OnePiece(self.pairs)

  def read(
    self, folder: pathlib.Path, split: str
  ) -> tuple[store.Stream, store.Stream]:
    """The streams of inputs and of targets in a folder of this source's tokens.

    Each has as many texts as the other.
    """
    inputs, targets = self.streams
    return (
      store.read_stream(folder, split, inputs),
      store.read_stream(folder, split, targets),
    )

  def with_prefix(self, prefix: str) -> 'Pairs':
    """The same pairs with `prefix` before all inputs."""
    if not prefix:
      return self
    return dataclasses.replace(
      self,
      identity=f'{self.identity} prefix {prefix!r}',
      pairs=lambda split: ((prefix + i, t) for i, t in self.pairs(split)),
    )


class Question(NamedTuple):
  """A validation example, and how an answer to it is judged.

  Attributes:
    inputs: Text that a model is given.
    target: The right answer.
    choices: All answers to choose from; empty where an answer is any text.
    metric: Name of the score of `moe_jax.evaluation.scores` for any text.
  """

  inputs: str
  target: str
  choices: tuple[str, ...] = ()
  metric: str = 'exact_match'


class SourceOptions(Options):
  """Contract of a source, whose options open its texts, its pairs, or both.

  A source overrides `texts`, `pairs`, or both, by what it gives.

  Attributes:
    only_in: 'texts' or 'pairs' for the name of each option that has an effect
      only where these are read; all other options always have an effect.
    is_embedded: Whether the source needs no file. With ':runlocal', such a
      source stays in a mixture, and all other sources are replaced.
    metric: Name of the score of `moe_jax.evaluation.scores` by which answers to
      the source's pairs are judged, unless it has `questions` of its own.
  """

  is_embedded: ClassVar[bool] = False
  only_in: ClassVar[Mapping[str, str]] = {}
  metric: ClassVar[str] = 'exact_match'

  def texts(self, selection: Selection = Selection()) -> Texts:
    """The documents of the source, in two splits.

    Raises:
      ValueError: The source has no texts, or its data is missing or bad.
    """
    del selection
    raise InputError(f'{type(self).__name__} gives no texts')

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """The pairs of inputs and targets of the source, in two splits.

    Raises:
      ValueError: The source has no pairs, or its data is missing or bad.
    """
    del selection
    raise InputError(f'{type(self).__name__} gives no pairs')

  @property
  def cluster(self) -> str:
    """Name of the source's cluster, a group of similar sources; '' for none."""
    return ''

  def questions(self, selection: Selection = Selection()) -> list[Question]:
    """The validation pairs as questions; raises ValueError as `pairs` does."""
    pairs = self.pairs(selection).pairs('validation')
    return [Question(*pair, metric=self.metric) for pair in pairs if all(pair)]

  @classmethod
  def gives(cls) -> tuple[str, ...]:
    """What the source gives: 'texts', 'pairs', or both."""
    given = {
      'texts': cls.texts is not SourceOptions.texts,
      'pairs': cls.pairs is not SourceOptions.pairs,
    }
    return tuple(form for form in given if given[form])
