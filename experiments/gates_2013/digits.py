"""Images of digits at random places of a larger canvas.

scikit-learn's digits are 1,797 images of 8x8, part of the UCI's optical
recognition of handwritten digits; they come with the package. Deep mixture of
experts (https://arxiv.org/abs/1312.4314) moves the images of MNIST, here a TFDS
dataset, by up to 4 pixels.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import numpy as np

from experiments.study.runner import arrays_digest
from moe_jax.data.sources import tfds
from moe_jax.errors import InputError

EVERY = 5  # every fifth image of each class is for validation
# Number of images of a set, and sides in pixels of images and canvas.
CANVAS = {'digits': 14, 'mnist': 36}


class Digits(NamedTuple):
  """Images of one split and their classes.

  Attributes:
    images: float32 [N, h, w], from 0 (paper) to 1 (ink).
    labels: int32 [N].
  """

  images: np.ndarray
  labels: np.ndarray


@functools.lru_cache(maxsize=1)
def load(name: str) -> tuple[Digits, Digits]:
  """Images to train on and to validate: 'digits', or 'mnist' of TFDS.

  Raises:
    ValueError: scikit-learn is not installed, or MNIST is not prepared.
  """
  if name == 'mnist':
    builder = tfds.prepared_builder(name)
    return _mnist(builder, 'train'), _mnist(builder, 'test')
  try:
    from sklearn import datasets
  except ImportError as error:
    raise InputError(
      "digits need scikit-learn; it is in the extra 'experiments': "
      "pip install 'moe_jax[experiments]'"
    ) from error
  digits: Any = datasets.load_digits()
  images = (digits.images / 16).astype(np.float32)
  labels = digits.target.astype(np.int32)
  held_out = is_held_out(labels)
  split = Digits(images[~held_out], labels[~held_out])
  return split, Digits(images[held_out], labels[held_out])


def _mnist(builder: Any, split: str) -> Digits:
  examples = list(tfds.open_split(builder, split))
  images = np.stack([example['image'][..., 0] for example in examples])
  labels = np.array([example['label'] for example in examples], np.int32)
  return Digits(images.astype(np.float32) / 255, labels)


def is_held_out(labels: np.ndarray) -> np.ndarray:
  """Whether each example is for validation, bool [N]: every fifth of a class.

  Neighbours may be by the same writer, who is then in both splits.
  """
  held_out = np.zeros(len(labels), bool)
  for label in np.unique(labels):
    held_out[np.flatnonzero(labels == label)[EVERY - 1 :: EVERY]] = True
  return held_out


def placed(images: np.ndarray, offsets: np.ndarray, canvas: int) -> np.ndarray:
  """Each image on an empty canvas, its upper left corner at (row, column).

  Args:
    images: float32 [N, h, w].
    offsets: Rows and columns, int [N, 2].
    canvas: Side of the square canvas; float32 [N, canvas, canvas] is returned.

  Raises:
    ValueError: An image would not lie fully on the canvas.
  """
  N, h, w = images.shape
  room = np.array([canvas - h, canvas - w])
  if (offsets < 0).any() or (offsets > room).any():
    raise InputError(
      f'offsets up to {offsets.max(0).tolist()}, from '
      f'{offsets.min(0).tolist()}, not in [0, {room.tolist()}]: images of '
      f'{h}x{w} on a canvas of {canvas}x{canvas}'
    )
  canvases = np.zeros((N, canvas, canvas), np.float32)
  rows = offsets[:, 0, None, None] + np.arange(h)[None, :, None]
  columns = offsets[:, 1, None, None] + np.arange(w)[None, None]
  canvases[np.arange(N)[:, None, None], rows, columns] = images
  return canvases


def batches(
  digits: Digits, canvas: int, seed: int, batch_size: int, steps: int
) -> Iterator[Digits]:
  """Batches of images at random places; the same for the same seed.

  Images are shuffled anew each epoch, and each time all places are equally
  likely for each; a batch may span two epochs.

  Args:
    digits: The training images.
    canvas: Side of the canvas.
    seed: Seed of the order and the places.
    batch_size: Number of images in a batch.
    steps: Number of batches.
  """
  N, h, w = digits.images.shape
  room = np.array([canvas - h, canvas - w])
  # grain shuffles epoch e with seed + e, so neighbouring seeds would have the
  # same orders, one epoch apart.
  seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  epochs = -(-steps * batch_size // N)
  order = grain.MapDataset.range(N).shuffle(seed).repeat(epochs)
  for step in range(steps):
    rows = range(step * batch_size, (step + 1) * batch_size)
    chosen = [order[row] for row in rows]
    offsets = [
      np.random.default_rng([seed, row // N, i]).integers(0, room + 1)
      for row, i in zip(rows, chosen, strict=True)
    ]
    images = placed(digits.images[chosen], np.stack(offsets), canvas)
    yield Digits(images, digits.labels[chosen])


def digest(splits: tuple[Digits, Digits], canvas: int) -> str:
  """The sha256 of the images of both splits, before they are moved."""
  classes = tuple(map(str, np.unique(splits[0].labels)))
  return arrays_digest(splits, f'{(canvas, canvas)} {classes}')
