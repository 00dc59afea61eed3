"""Arrays with a class each, in a numpy file."""

import dataclasses
import pathlib

import numpy as np

from moe_jax.data.plain_files import read_npz
from moe_jax.data.sources.class_examples import Examples, checked_examples
from moe_jax.data.sources.contract import (
  SPLITS,
  ClassSource,
  Selection,
  SourceOptions,
)
from moe_jax.errors import InputError
from moe_jax.options import NOT_EMPTY, option, unknown
from moe_jax.shapes import Int32, Shaped


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
      raise InputError(f'source npz: no file {file}')
    self._arrays = read_npz(file)
    self.name = f'classes of {file.name}'
    splits = {split: self.examples(split) for split in SPLITS}
    labels = np.concatenate([e.labels for e in splits.values()])
    self.classes = self._names(labels, file)
    if labels.max() >= len(self.classes):
      raise InputError(
        f'{file}: labels from {labels.min()} to {labels.max()} of '
        f'{len(self.classes)} classes'
      )
    train, validation = (e.features.shape[1:] for e in splits.values())
    if train != validation:
      raise InputError(
        f'{file}: features of an example have shape {train} in training and '
        f'{validation} in validation; they must be alike'
      )

  def examples(self, split: str) -> Examples:
    """See `ClassSource`."""
    features, labels = (
      self._array(split, 'features'),
      self._array(split, 'labels'),
    )
    return checked_examples(features, labels, f'{split!r} of {self.name}')

  def _names(
    self, labels: Int32[np.ndarray, ' N'], file: pathlib.Path
  ) -> tuple[str, ...]:
    names = self._arrays.get('classes')
    if names is None:
      # A label of 10^9 would otherwise make as many names.
      if labels.max() >= len(labels):
        raise InputError(
          f'{file}: a label of {labels.max()} needs more classes than there '
          f'are examples, {len(labels)}; if it is right, add the array '
          "'classes' with their names"
        )
      names = np.arange(labels.max() + 1)
    if names.ndim != 1 or names.dtype.kind not in 'Uiu':
      raise InputError(
        f'{file}: classes {names.shape} of {names.dtype} must be names [C]'
      )
    return tuple(map(str, names.tolist()))

  def _array(self, split: str, kind: str) -> Shaped[np.ndarray, '...']:
    name = f'{split}_{kind}'
    if name not in self._arrays:
      raise unknown(f'array of {self.name}', name, sorted(self._arrays))
    return self._arrays[name]
