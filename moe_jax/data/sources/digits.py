"""Images of digits, as they are or at random places of a larger canvas.

scikit-learn's digits are 1,797 images of 8x8, part of the UCI's optical
recognition of handwritten digits; they come with the package. Deep mixture of
experts (https://arxiv.org/abs/1312.4314) moves the images of MNIST, a TFDS
dataset, by up to 4 pixels. Not here: how rows and epochs are drawn
(`data/tasks/classes.py`), and the images of TFDS (`tfds.py`).
"""

import dataclasses

import numpy as np

from moe_jax.data.sources.contract import (
  SPLITS,
  ClassSource,
  Examples,
  Selection,
  SourceOptions,
)
from moe_jax.options import at_least, option, unknown
from moe_jax.shapes import Float32, Int, Int32

SIDE = 8  # pixels of scikit-learn's images
EVERY = 5  # of each class, every fifth image is for validation


@dataclasses.dataclass(frozen=True)
class DigitsSource(SourceOptions):
  """scikit-learn's images of handwritten digits."""

  names_splits = False

  canvas: int = option(
    SIDE,
    'Side in pixels of the square that an image is put on, at a random place '
    f'whenever it is drawn; {SIDE} is the side of the images themselves, which '
    'then stay as they are.',
    at_least(SIDE),
  )

  def classes(self, selection: Selection = Selection()) -> 'Digits':
    """The images; every fifth of a digit is for validation.

    Raises:
      ValueError: scikit-learn is not installed.
    """
    del selection
    found = load_digits()
    held_out = is_held_out(found.labels)
    splits = {
      split: Examples(*(array[part] for array in found))
      for split, part in zip(SPLITS, (~held_out, held_out), strict=True)
    }
    size = f'{self.canvas}x{self.canvas}'
    label = 'digits' if self.canvas == SIDE else f'jittered digits ({size})'
    return Digits(
      f"{label}, scikit-learn's ({len(found.labels)} images)",
      splits,
      tuple(str(digit) for digit in np.unique(found.labels)),
      (self.canvas, self.canvas),
    )


def load_digits() -> Examples:
  """scikit-learn's images [1797, 8, 8], from 0 (paper) to 1 (ink).

  Raises:
    ValueError: scikit-learn is not installed.
  """
  try:
    from sklearn import datasets
  except ImportError as error:
    raise ValueError(
      "digits need scikit-learn; it is in the extra 'experiments': "
      "pip install 'moe_jax[experiments]'"
    ) from error
  found = datasets.load_digits()
  features = (found.images / 16).astype(np.float32)
  return Examples(features, found.target.astype(np.int32))


def is_held_out(labels: Int32[np.ndarray, ' N']) -> np.ndarray:
  """Bool [N]: which examples are for validation, every fifth of each class.

  Neighbours may be of one writer, who is then in both splits.
  """
  held_out = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    held_out[np.flatnonzero(labels == label)[EVERY - 1 :: EVERY]] = True
  return held_out


def placed(
  images: Float32[np.ndarray, 'N h w'],
  offsets: Int[np.ndarray, 'N 2'],
  canvas: tuple[int, int],
) -> Float32[np.ndarray, 'N H W']:
  """Each image on an empty canvas, its upper left corner at (row, column).

  Raises:
    ValueError: An image would not be whole.
  """
  N, h, w = images.shape
  room = np.array(canvas) - (h, w)
  if (offsets < 0).any() or (offsets > room).any():
    raise ValueError(
      f'offsets up to {offsets.max(0).tolist()}, from '
      f'{offsets.min(0).tolist()}, not in [0, {room.tolist()}]: images of '
      f'{h}x{w} on a canvas of {canvas[0]}x{canvas[1]}'
    )
  made = np.zeros((N, *canvas), np.float32)
  rows = offsets[:, 0, None, None] + np.arange(h)[None, :, None]
  columns = offsets[:, 1, None, None] + np.arange(w)[None, None]
  made[np.arange(N)[:, None, None], rows, columns] = images
  return made


class Digits(ClassSource):
  """Images of two splits.

  Attributes:
    canvas: Height and width of what a model sees; those of the images where
      they are not moved.
  """

  def __init__(
    self,
    name: str,
    splits: dict[str, Examples],
    classes: tuple[str, ...],
    canvas: tuple[int, int],
  ):
    """Takes images [N, h, w] from 0 to 1, which fit on the canvas."""
    self.name, self.classes, self.canvas = name, classes, canvas
    self._splits = splits

  def examples(self, split: str) -> Examples:
    """The images before they are moved.

    Raises:
      ValueError: There is no such split.
    """
    if split not in self._splits:
      raise unknown(f'split of {self.name}', split, SPLITS)
    return self._splits[split]

  @property
  def room(self) -> np.ndarray:
    """Int [2]: how many rows and columns an image can move."""
    return np.array(self.canvas) - self._splits['train'].features.shape[1:]

  def jittered(
    self, features: Float32[np.ndarray, 'N h w'], generator: np.random.Generator
  ) -> Float32[np.ndarray, 'N H W']:
    """Each image at a place of its own, all places equally likely."""
    if not self.room.any():
      return features
    offsets = generator.integers(0, self.room + 1, (len(features), 2))
    return placed(features, offsets, self.canvas)
