"""Arrays with a class each, in a numpy file."""

import dataclasses
import pathlib

import numpy as np

from moe_jax.data.sources.contract import (
  SPLITS,
  ClassSource,
  Examples,
  Selection,
  SourceOptions,
)
from moe_jax.options import NOT_EMPTY, option, unknown
from moe_jax.shapes import Shaped


@dataclasses.dataclass(frozen=True)
class NpzSource(SourceOptions):
  """Arrays `train_features`, `train_labels`, `validation_features`, ...

  Labels are integers from 0; the file may also have `classes`, an array of
  their names.
  """

  names_splits = False

  path: str = option(
    dataclasses.MISSING,
    'Path of the .npz file with the features and labels of both splits.',
    NOT_EMPTY,
  )

  def classes(self, selection: Selection = Selection()) -> 'Arrays':
    """The examples of the file.

    Raises:
      ValueError: The file is missing, lacks an array, or its arrays do not fit
        together.
    """
    del selection
    return Arrays(self.path)


class Arrays(ClassSource):
  """The examples of one file."""

  def __init__(self, path: str):
    """Reads the file; nothing in it is unpickled.

    Raises:
      ValueError: The file is missing, lacks an array, or its arrays do not fit
        together.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
      raise ValueError(f'source npz: no file {file}')
    with np.load(file, allow_pickle=False) as arrays:
      self._arrays = dict(arrays)
    self.name = f'classes of {file.name}'
    splits = {split: self.examples(split) for split in SPLITS}
    labels = np.concatenate([e.labels for e in splits.values()])
    names = self._arrays.get('classes', np.arange(labels.max() + 1))
    self.classes = tuple(map(str, names.tolist()))
    if labels.min() < 0 or labels.max() >= len(self.classes):
      raise ValueError(
        f'{file}: labels from {labels.min()} to {labels.max()} of '
        f'{len(self.classes)} classes'
      )
    train, validation = (e.features.shape[1:] for e in splits.values())
    if train != validation:
      raise ValueError(f'{file}: features of {train} and of {validation}')

  def examples(self, split: str) -> Examples:
    """See `ClassSource`."""
    features, labels = (
      self._array(split, 'features'),
      self._array(split, 'labels'),
    )
    if labels.ndim != 1 or labels.dtype.kind not in 'iu' or features.ndim < 2:
      raise ValueError(
        f'{self.name}: {split}_labels {labels.shape} of {labels.dtype} must be '
        f'integers [N], {split}_features {features.shape} arrays [N, ...]'
      )
    if len(features) != len(labels) or not len(labels):
      raise ValueError(
        f'{self.name}: {len(features)} features and {len(labels)} labels of '
        f'{split!r}'
      )
    return Examples(features.astype(np.float32), labels.astype(np.int32))

  def _array(self, split: str, kind: str) -> Shaped[np.ndarray, 'N ...']:
    name = f'{split}_{kind}'
    if name not in self._arrays:
      raise unknown(f'array of {self.name}', name, sorted(self._arrays))
    return self._arrays[name]
