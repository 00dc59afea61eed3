"""Images of digits, as they are or at random places of a larger canvas.

scikit-learn's digits are 1,797 images of 8x8, part of the UCI's optical
recognition of handwritten digits; they come with the package. TFDS's, such as
MNIST, are of whoever has prepared them. Deep mixture of experts
(https://arxiv.org/abs/1312.4314) moves MNIST's by up to 4 pixels. Not here:
how rows and epochs are drawn (`data/tasks/class_rows.py`).
"""

import numpy as np

from moe_jax.config import unknown
from moe_jax.data.sources import tfds_reader
from moe_jax.data.sources.classes import ClassSource, Examples
from moe_jax.shapes import Float32, Int, Int32

CANVAS = 14  # of jittered_digits: 7 x 7 places
SHIFT = 4  # pixels each way, of a TFDS dataset's
EVERY = 5  # so many images of a class, one is for validation
SPLITS = ('train', 'validation')


def load_digits() -> Examples:
  """scikit-learn's, [1797, 8, 8], from 0 (paper) to 1 (ink).

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
  """Which examples are for validation: of each class, in order, every fifth.

  Neighbours may be of one writer, who is then in both splits. Bool [N].
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
    ValueError: One would not be whole.
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
    canvas: Height and width of what a model sees; the images' own where they
      are not moved.
  """

  def __init__(
    self,
    name: str,
    splits: dict[str, Examples],
    classes: tuple[str, ...],
    canvas: tuple[int, int],
  ):
    """Of images [N, h, w] from 0 to 1, which fit on the canvas."""
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
    """How many rows and columns an image can move. Int [2]."""
    return np.array(self.canvas) - self._splits['train'].features.shape[1:]

  def jittered(
    self, features: Float32[np.ndarray, 'N h w'], generator: np.random.Generator
  ) -> Float32[np.ndarray, 'N H W']:
    """Each image at a place of its own, all places equally likely."""
    if not self.room.any():
      return features
    offsets = generator.integers(0, self.room + 1, (len(features), 2))
    return placed(features, offsets, self.canvas)


def open_digits(jitter: bool) -> Digits:
  """scikit-learn's, or 'jittered digits': theirs on a canvas of 14x14.

  Raises:
    ValueError: scikit-learn is not installed.
  """
  found = load_digits()
  held_out = is_held_out(found.labels)
  parts = dict(zip(SPLITS, (~held_out, held_out), strict=True))
  splits = {
    split: Examples(*(array[part] for array in found))
    for split, part in parts.items()
  }
  kind = f'jittered digits ({CANVAS}x{CANVAS})' if jitter else 'digits'
  side = CANVAS if jitter else found.features.shape[1]
  classes = tuple(str(label) for label in np.unique(found.labels))
  name = f"{kind}, scikit-learn's ({len(found.labels)} images)"
  return Digits(name, splits, classes, (side, side))


def open_tfds(name: str) -> Digits:
  """A TFDS dataset of grey images, moved by up to 4 pixels each way.

  MNIST's 28x28 come to 36x36. Its split 'test' is our validation.

  Raises:
    ValueError: The dataset is not here, or is not of grey images with labels.
  """
  builder = tfds_reader.prepared_builder(name)
  for feature in ('image', 'label'):
    tfds_reader.check_feature(builder, feature, 'feature')
  shape = builder.info.features['image'].shape
  if len(shape) != 3 or None in shape or shape[-1] != 1:
    raise ValueError(
      f'images of TFDS dataset {name!r} are {shape}; they are to be grey and '
      'of one size'
    )
  splits = {
    split: _read(builder, theirs)
    for split, theirs in zip(SPLITS, ('train', 'test'), strict=True)
  }
  classes = tuple(builder.info.features['label'].names)
  canvas = (shape[0] + 2 * SHIFT, shape[1] + 2 * SHIFT)
  full = f'tfds:{builder.info.full_name}, moved by up to {SHIFT} pixels'
  return Digits(full, splits, classes, canvas)


def _read(builder: tfds_reader.Builder, split: str) -> Examples:
  images, labels = [], []
  for example in tfds_reader.open_split(builder, split):
    images.append(example['image'][..., 0])
    labels.append(example['label'])
  features = np.stack(images).astype(np.float32) / 255
  return Examples(features, np.array(labels, np.int32))
