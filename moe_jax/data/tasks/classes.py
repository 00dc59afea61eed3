"""Rows of examples that have a class each; a row is one example, T = 1."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from moe_jax.data.layouts import RowShape
from moe_jax.data.packing import Rows
from moe_jax.data.sources.class_examples import checked_examples
from moe_jax.data.sources.contract import (
  SPLITS,
  ClassSource,
  Selection,
  SourceOptions,
)
from moe_jax.data.tasks.contract import Dataset, TaskOptions
from moe_jax.data.tokenizers import ClassNames, TokenizerOptions
from moe_jax.errors import InputError
from moe_jax.shapes import Int


@dataclasses.dataclass(frozen=True)
class ClassesTask(TaskOptions):
  """Examples that are arrays, each of which belongs to a class."""

  reads = 'classes'
  label = 'classes'
  has_tokens = False
  makes_examples = False

  def problems_with(self, shape: RowShape) -> Iterator[str]:
    """`seq_len` must be 1, as a row is one example without a length."""
    if shape.seq_len != 1:
      yield (
        f'seq_len={shape.seq_len} must be 1: a row is one example and no text'
      )

  def load(
    self,
    source: SourceOptions,
    tokenizer: TokenizerOptions,
    selection: Selection,
    shape: RowShape,
  ) -> Dataset:
    """See `TaskOptions.load`; the vocabulary is that of the classes' names."""
    del tokenizer, shape
    opened = source.classes(selection)
    rows = {split: ClassRows(opened, split) for split in SPLITS}
    splits: dict[str, Rows] = {**rows}
    feature_shape = rows['train'].feature_shape
    return Dataset(
      source=opened.name,
      tokenizer=ClassNames(opened.classes, feature_shape),
      splits=splits,
      digest=digest_of(rows),
      counts={split: {'examples': len(rows)} for split, rows in splits.items()},
      task=self,
    )


class ClassRows(Rows):
  """Random access to examples; a batch is a dict of

  - `features` float32 [B, ...]: 0 for padding.
  - `targets` int32 [B, 1]: the indices of the classes.
  - `segment_ids` int32 [B, 1]: 1, or 0 for padding.
  - `loss_weights` float32 [B, 1]: 1, or 0 for padding.
  """

  def __init__(self, source: ClassSource, split: str):
    self._source = source
    features, labels = map(np.asarray, source.examples(split))
    where = f'{split!r} of {source.name}'
    self._features, self._labels = checked_examples(features, labels, where)
    if (largest := self._labels.max()) >= len(source.classes):
      raise InputError(
        f'{where}: label {largest} is none of {len(source.classes)} classes'
      )

  @property
  def feature_shape(self) -> tuple[int, ...]:
    """The shape of one example in a batch."""
    return self.take(np.array([0]))['features'].shape[1:]

  def __len__(self) -> int:
    return len(self._labels)

  def describe(self) -> str:
    """The number of examples and their shape: `7 examples of (2,)`."""
    return f'{len(self):,} examples of {self.feature_shape}'

  def draw(
    self,
    indices: Int[np.ndarray, ' B'],
    seed: int,
    epochs: Int[np.ndarray, ' B'],
  ) -> dict[str, np.ndarray]:
    """The rows at `indices`, jittered anew in each epoch."""
    real = np.asarray(indices) < len(self)
    drawn = [
      self._source.jittered(
        self._features[i : i + 1], np.random.default_rng([seed, epoch, i])
      )
      for i, epoch in zip(np.where(real, indices, 0), epochs, strict=True)
    ]
    features = np.concatenate(drawn)
    mask = real.reshape(-1, *[1] * (features.ndim - 1))
    labels = self._labels[np.where(real, indices, 0)] * real
    return {
      'features': features * mask.astype(np.float32),
      'targets': labels[:, None].astype(np.int32),
      'segment_ids': real[:, None].astype(np.int32),
      'loss_weights': real[:, None].astype(np.float32),
    }

  def update(self, sha256) -> None:
    """Adds all examples, without jitter, and their classes to a digest."""
    about = f'{self.feature_shape} {self._source.classes}\n'
    sha256.update(about.encode())
    for array in (self._features, self._labels):
      sha256.update(f'{array.shape} {array.dtype}\n'.encode())
      sha256.update(np.ascontiguousarray(array).tobytes())


def digest_of(splits: Mapping[str, ClassRows]) -> str:
  """The sha256 of the examples of all splits, in order."""
  sha256 = hashlib.sha256()
  for name, rows in splits.items():
    sha256.update(f'split {name}\n'.encode())
    rows.update(sha256)
  return sha256.hexdigest()
