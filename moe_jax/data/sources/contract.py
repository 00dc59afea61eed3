"""What a source of data is: texts, pairs of texts, or examples with a class.

A source's options open it in one or more of these forms; a task reads one.
Each form has two splits, 'train' and 'validation', and an identity that
changes with their content. Not here: tokens (`moe_jax.data.store`) and rows of
batches (`moe_jax.data.tasks`).
"""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple

import numpy as np

from moe_jax.data import store
from moe_jax.data.tokenizers.contract import Tokenizer
from moe_jax.option_checks import no_effect
from moe_jax.options import Options, default_of, fields_of, unknown
from moe_jax.shapes import Float32

SPLITS = ('train', 'validation')
Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which parts of a source are read, and where what it prepares is kept.

  Attributes:
    splits: The source's own names of our train and validation split. TFDS
      sources, python_stdlib and its docstrings among them, take any split
      expression, such as 'train[90%:]'.
    cache_dir: Folder of prepared data; '' is the one that
      `moe_jax.data.cache_folders.cache_root` names.
  """

  splits: tuple[str, str] = SPLITS
  cache_dir: str = ''

  def own(self, split: str) -> str:
    """The source's own name of our split."""
    return self.splits[SPLITS.index(split)]

  def check_splits(self, source: str) -> None:
    """Raises ValueError unless the splits are our two, in whatever order."""
    for split in self.splits:
      if split not in SPLITS:
        raise unknown(f'split of {source}', split, SPLITS)


@dataclasses.dataclass(frozen=True)
class Texts:
  """Documents in two splits.

  Attributes:
    name: Description of the source for people.
    identity: Text that is equal only for equal documents in equal order; it is
      known without a pass over the documents of a TFDS dataset.
    documents: Function from 'train' or 'validation' to a stream of the texts,
      which begins anew at each call and has the same order.
  """

  name: str
  identity: str
  documents: Callable[[str], Iterator[str]]

  def texts(self, split: str) -> Iterator[str]:
    """Every text of a split, for tokenizers that are fitted to them."""
    return self.documents(split)

  def write(self, folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes the tokens of both splits; see `store.write_tokens`."""
    splits = {split: self.documents(split) for split in SPLITS}
    store.write_tokens(folder, splits, tokenizer)

  def read(self, folder: pathlib.Path, split: str) -> store.Stream:
    """The tokens that `write` wrote; see `store.read_tokens`."""
    return store.read_tokens(folder, split)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Pairs of inputs and targets in two splits.

  Attributes:
    name: Description of the source for people.
    identity: Text that is equal only for equal pairs in equal order; it is
      known without a pass over the pairs of a TFDS dataset.
    pairs: Function from 'train' or 'validation' to a stream of (inputs,
      targets), which begins anew at each call and has the same order.
  """

  name: str
  identity: str
  pairs: Callable[[str], Iterator[Pair]]

  def texts(self, split: str) -> Iterator[str]:
    """Every text of a split, for tokenizers that are fitted to them."""
    return (text for pair in self.pairs(split) for text in pair)

  def write(self, folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes the tokens of both splits; see `store.write_pairs`."""
    splits = {split: self.pairs(split) for split in SPLITS}
    store.write_pairs(folder, splits, tokenizer)

  def read(
    self, folder: pathlib.Path, split: str
  ) -> tuple[store.Stream, store.Stream]:
    """The tokens that `write` wrote; see `store.read_pairs`."""
    return store.read_pairs(folder, split)

  def with_prefix(self, prefix: str) -> 'Pairs':
    """The same pairs with `prefix` before all inputs."""
    if not prefix:
      return self
    return dataclasses.replace(
      self,
      identity=f'{self.identity} prefix {prefix!r}',
      pairs=lambda split: ((prefix + i, t) for i, t in self.pairs(split)),
    )


class Examples(NamedTuple):
  """Arrays and the classes that they belong to.

  Attributes:
    features: float32 [N, ...].
    labels: int32 [N], indices of classes.
  """

  features: np.ndarray
  labels: np.ndarray


class ClassSource(abc.ABC):
  """Examples with a class each, in two splits.

  Attributes:
    name: Description of the source for people.
    classes: Names of the classes, in the order of their indices.
  """

  name: str
  classes: tuple[str, ...]

  @abc.abstractmethod
  def examples(self, split: str) -> Examples:
    """The examples of 'train' or of 'validation', the same at every call."""

  def jittered(
    self, features: Float32[np.ndarray, 'N ...'], generator: np.random.Generator
  ) -> Float32[np.ndarray, 'N ...']:
    """The features as a batch has them; a source may move or distort them."""
    del generator
    return features


class SourceOptions(Options):
  """Contract of a source: its options open it in one form or several.

  A source overrides those of `texts`, `pairs` and `classes` that it can give.

  Attributes:
    names_splits: Whether the data's own names of the splits choose what is
      read; False where the source has two splits of its own and no others.
    only_in: Form in which an option has an effect, by the option's name;
      options that are not named here have one in every form.
  """

  names_splits: ClassVar[bool] = True
  only_in: ClassVar[Mapping[str, str]] = {}

  def texts(self, selection: Selection = Selection()) -> Texts:
    """The documents.

    Raises:
      ValueError: The source has none, or its data is missing or bad.
    """
    del selection
    raise ValueError(f'{type(self).__name__} gives no texts')

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """The pairs of inputs and targets.

    Raises:
      ValueError: The source has none, or its data is missing or bad.
    """
    del selection
    raise ValueError(f'{type(self).__name__} gives no pairs')

  def classes(self, selection: Selection = Selection()) -> ClassSource:
    """The examples with a class each.

    Raises:
      ValueError: The source has none, or its data is missing or bad.
    """
    del selection
    raise ValueError(f'{type(self).__name__} gives no classes')

  def idle_options(self, form: str, path: str) -> Iterator[str]:
    """The options that are set without effect where `form` is read.

    Args:
      form: One of 'texts', 'pairs' and 'classes'.
      path: Dotted name of the section of these options, for the messages.
    """
    fields = fields_of(type(self))
    for name, only in self.only_in.items():
      value = getattr(self, name)
      if only != form and value != default_of(fields[name]):
        yield no_effect(f'{path}{name}', value, f'where {form} are read')

  @classmethod
  def gives(cls) -> tuple[str, ...]:
    """Those of 'texts', 'pairs' and 'classes' that the source can give."""
    return tuple(
      form
      for form in ('texts', 'pairs', 'classes')
      if getattr(cls, form) is not getattr(SourceOptions, form)
    )
