"""Examples that are arrays with a class each, as those of before language.

A source has the arrays of two splits, and may move them about when they are
drawn (an image on its canvas). Not here: rows of batches
(`data/tasks/class_rows.py`).
"""

import abc
import pathlib
from typing import NamedTuple

import numpy as np

from moe_jax.config import unknown
from moe_jax.shapes import Float32, Shaped

KINDS = ('vowels', 'files:<path>', 'digits', 'jittered_digits')
KINDS += ('tfds:<name>', 'npz:<path>')


class Examples(NamedTuple):
  """Arrays and what they are of.

  Attributes:
    features: float32 [N, ...].
    labels: int32 [N], indices of classes.
  """

  features: np.ndarray
  labels: np.ndarray


class ClassSource(abc.ABC):
  """Examples in two splits.

  Attributes:
    name: For people.
    classes: Their names.
  """

  name: str
  classes: tuple[str, ...]

  @abc.abstractmethod
  def examples(self, split: str) -> Examples:
    """Those of 'train' or of 'validation', the same at every call."""

  def jittered(
    self, features: Float32[np.ndarray, 'N ...'], generator: np.random.Generator
  ) -> Float32[np.ndarray, 'N ...']:
    """The features as they are drawn; of all classes here, as they are."""
    del generator
    return features


class NpzSource(ClassSource):
  """Of a file of the user's: `<split>_features` and `<split>_labels`.

  Labels are integers from 0; `classes`, an array of names, may come with them.
  """

  def __init__(self, path: str):
    """Reads the file; nothing in it is unpickled.

    Raises:
      ValueError: It is missing, lacks an array, or they do not fit.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
      raise ValueError(f"source 'npz:{path}': no file {file}")
    with np.load(file, allow_pickle=False) as arrays:
      self._arrays = dict(arrays)
    self.name = f'classes of {file.name}'
    found = {split: self.examples(split) for split in ('train', 'validation')}
    labels = np.concatenate([e.labels for e in found.values()])
    names = self._arrays.get('classes', np.arange(labels.max() + 1))
    self.classes = tuple(map(str, names.tolist()))
    if labels.min() < 0 or labels.max() >= len(self.classes):
      raise ValueError(
        f'{file}: labels from {labels.min()} to {labels.max()} of '
        f'{len(self.classes)} classes'
      )
    train, validation = (e.features.shape[1:] for e in found.values())
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


def open_classes(spec: str) -> ClassSource:
  """The source that `spec` names.

  - `vowels`: four vowels of speakers drawn around published means; see
    `vowels.Drawn`.
  - `files:<path>`: the same vowels in a file of the table of Peterson and
    Barney 1952; see `vowels.open_table`.
  - `digits`: scikit-learn's images of digits, [8, 8].
  - `jittered_digits`: these at random places of a canvas of [14, 14].
  - `tfds:<name>`: grey images of a TFDS dataset, such as `tfds:mnist`, moved
    by up to 4 pixels; see `digits.open_tfds`.
  - `npz:<path>`: a file of the user's, see `NpzSource`.

  Raises:
    ValueError: It names none, or its data is missing or bad.
  """
  from moe_jax.data.sources import digits, vowels  # made of what is above

  kind, _, argument = spec.partition(':')
  if spec == 'vowels':
    return vowels.Drawn()
  if kind == 'files' and argument:
    return vowels.open_table(argument)
  if spec in ('digits', 'jittered_digits'):
    return digits.open_digits(jitter=spec != 'digits')
  if kind == 'tfds' and argument:
    return digits.open_tfds(argument)
  if kind == 'npz' and argument:
    return NpzSource(argument)
  raise unknown("source of the task 'classes'", spec, KINDS)
