"""Images of digits, as they are or at random positions on a larger canvas.

scikit-learn's digits are 1,797 images of 8x8, part of the UCI's optical
recognition of handwritten digits; they come with the package. Deep mixture of
experts (https://arxiv.org/abs/1312.4314) moves the images of MNIST, a TFDS
dataset, by up to 4 pixels. Not here: how rows and epochs are drawn
(`data/tasks/classes.py`), and reading of TFDS (`tfds.py`).
"""

import dataclasses
from typing import Any

import numpy as np

from moe_jax.data.sources.class_examples import Examples
from moe_jax.data.sources.contract import (
  SPLITS,
  ClassSource,
  Selection,
  SourceOptions,
)
from moe_jax.errors import InputError
from moe_jax.options import at_least, option, unknown
from moe_jax.shapes import Float32, Int, Int32

SIDE = 8  # pixels of scikit-learn's images
EVERY = 5  # every fifth image of each class is for validation


@dataclasses.dataclass(frozen=True)
class DigitsSource(SourceOptions):
  """scikit-learn's images of handwritten digits."""

  names_splits = False

  canvas: int = option(
    SIDE,
    'Side in pixels of the empty square on which an image is put, at a random '
    f'position whenever it is drawn; {SIDE} is the side of the images, which '
    'then do not move.',
    at_least(SIDE),
  )

  def classes(self, selection: Selection = Selection()) -> 'Digits':
    """The images; of each digit every fifth is for validation.

    Raises:
      ValueError: scikit-learn is not installed.
    """
    del selection
    digits = load_digits()
    held_out = is_held_out(digits.labels)
    splits = {
      split: Examples(*(array[part] for array in digits))
      for split, part in zip(SPLITS, (~held_out, held_out), strict=True)
    }
    size = f'{self.canvas}x{self.canvas}'
    label = 'digits' if self.canvas == SIDE else f'jittered digits ({size})'
    return Digits(
      f"{label}, scikit-learn's ({len(digits.labels)} images)",
      splits,
      tuple(str(digit) for digit in np.unique(digits.labels)),
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
    raise InputError(
      "digits need scikit-learn; it is in the extra 'experiments': "
      "pip install 'moe_jax[experiments]'"
    ) from error
  digits: Any = datasets.load_digits()
  features = (digits.images / 16).astype(np.float32)
  return Examples(features, digits.target.astype(np.int32))


def is_held_out(labels: Int32[np.ndarray, ' N']) -> np.ndarray:
  """Whether each example is for validation, bool [N]: every fifth of a class.

  Neighbours may be by the same writer, who is then in both splits.
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
    ValueError: An image would not lie fully on the canvas.
  """
  N, h, w = images.shape
  room = np.array(canvas) - (h, w)
  if (offsets < 0).any() or (offsets > room).any():
    raise InputError(
      f'offsets up to {offsets.max(0).tolist()}, from '
      f'{offsets.min(0).tolist()}, not in [0, {room.tolist()}]: images of '
      f'{h}x{w} on a canvas of {canvas[0]}x{canvas[1]}'
    )
  canvases = np.zeros((N, *canvas), np.float32)
  rows = offsets[:, 0, None, None] + np.arange(h)[None, :, None]
  columns = offsets[:, 1, None, None] + np.arange(w)[None, None]
  canvases[np.arange(N)[:, None, None], rows, columns] = images
  return canvases


class Digits(ClassSource):
  """Images of two splits.

  Attributes:
    canvas: Height and width of the images in a batch; those of the images
      themselves if they are not moved.
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
    """The numbers of rows and columns by which an image can move, int [2]."""
    return np.array(self.canvas) - self._splits['train'].features.shape[1:]

  def jittered(
    self, features: Float32[np.ndarray, 'N h w'], generator: np.random.Generator
  ) -> Float32[np.ndarray, 'N H W']:
    """Each image at a position of its own, all positions equally likely."""
    if not self.room.any():
      return features
    offsets = generator.integers(0, self.room + 1, (len(features), 2))
    return placed(features, offsets, self.canvas)
