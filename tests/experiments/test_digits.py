"""Digits at random places: the splits, the places, the stream of batches."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.gates_2013 import digits


def test_every_fifth_of_a_class_is_held_out():
  labels = np.array([0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1], np.int32)
  # The fifth 0 is at index 6 and the fifth 1 at index 10; neither class has a
  # tenth.
  assert np.flatnonzero(digits.is_held_out(labels)).tolist() == [6, 10]


def test_the_splits_are_apart_stratified_and_fixed():
  splits = digits.load('digits')
  counts = np.array([np.bincount(e.labels, minlength=10) for e in splits])
  assert counts.sum() == 1797
  np.testing.assert_array_equal(counts[1], counts.sum(0) // 5)
  assert splits[0].images.min() == 0 and splits[0].images.max() == 1
  # The stored results are of these images.
  assert digits.digest(splits, 14).startswith('25f98d915b07')


def test_batches_have_whole_images_at_every_place():
  # No pixel is background, so that the place shows; the number is the image's.
  numbers = np.arange(1, 6, dtype=np.float32)
  images = np.tile(numbers[:, None, None], (1, 8, 8))
  few = digits.Digits(images, np.arange(5, dtype=np.int32))
  batches = list(digits.batches(few, 14, 3, 20, 100))
  again = list(digits.batches(few, 14, 3, 20, 100))
  np.testing.assert_array_equal(batches[7].images, again[7].images)
  shifted = np.concatenate([batch.images for batch in batches])
  labels = np.concatenate([batch.labels for batch in batches])
  np.testing.assert_array_equal(shifted.max((1, 2)), labels + 1)
  # Every epoch has each image once, in another order.
  epochs = labels.reshape(-1, 5)
  assert (np.sort(epochs) == np.arange(5)).all()
  assert len(np.unique(epochs, axis=0)) > 50
  ink = shifted > 0
  np.testing.assert_array_equal(ink.sum((1, 2)), 64)
  rows, columns = ink.any(2).argmax(1), ink.any(1).argmax(1)
  counts = np.bincount(7 * rows + columns, minlength=49)
  # Each place is expected 41 times; five standard deviations are 32.
  assert len(counts) == 49 and counts.min() > 9 and counts.max() < 73


# Registered, it would be the 'mnist' of all other tests of the process.
class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A dataset of images in which the pixel of their number is white."""

  VERSION = tfds.core.Version('3.0.1')  # that of TFDS
  SHAPE = (3, 4, 1)

  def _info(self):
    features = {
      'image': tfds.features.Image(shape=self.SHAPE, encoding_format='png'),
      'label': tfds.features.ClassLabel(names=['odd', 'even']),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    numbers = {'train': range(8), 'test': range(8, 12)}
    return {k: self._generate_examples(v) for k, v in numbers.items()}

  def _generate_examples(self, numbers):
    for i in numbers:
      image = np.zeros(self.SHAPE, np.uint8)
      image.reshape(-1, self.SHAPE[-1])[i] = 255
      # TFDS would encode a numpy array with TensorFlow.
      image = Image.fromarray(image.squeeze())
      yield i, {'image': image, 'label': 'odd' if i % 2 else 'even'}


@pytest.mark.slow
def test_mnist_is_that_of_tfds(tmp_path, monkeypatch):
  dataset = Mnist(data_dir=tmp_path, file_format='array_record')
  dataset.download_and_prepare()
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  digits.load.cache_clear()
  train, validation = digits.load('mnist')
  digits.load.cache_clear()
  assert (len(train.labels), len(validation.labels)) == (8, 4)
  for images, labels in (train, validation):
    assert images.max(axis=(1, 2)).tolist() == [1.0] * len(labels)
    spot = images.reshape(len(labels), -1).argmax(1)
    np.testing.assert_array_equal(labels, (spot + 1) % 2)
