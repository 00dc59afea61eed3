"""Digits: two splits, random places on a canvas, and TFDS's datasets."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from moe_jax.data import ClassRows, DigitsSource, Selection, TfdsSource
from moe_jax.data.sources import digits

# MNIST's held-out split is called 'test'.
SPLITS = Selection(('train', 'test'))


@pytest.fixture(scope='module')
def jittered_source():
  return DigitsSource(canvas=14).classes()


def test_an_image_is_put_where_it_is_told():
  # Two images of 1x2 pixels stand in opposite corners of canvases of 2x3.
  images = np.array([[[1, 2]], [[3, 4]]], np.float32)
  canvases = digits.placed(images, np.array([[0, 1], [1, 0]]), (2, 3))
  expected = [[[0, 1, 2], [0, 0, 0]], [[0, 0, 0], [3, 4, 0]]]
  np.testing.assert_array_equal(canvases, expected)
  for offset in ([0, 2], [-1, 0]):
    with pytest.raises(ValueError, match=r'not in \[0, \[1, 1\]\].* of 2x3'):
      digits.placed(images, np.array([offset, offset]), (2, 3))


def test_every_fifth_of_a_class_is_held_out():
  labels = np.array([0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1], np.int32)
  # The fifth 0 is at index 6 and the fifth 1 at index 10; neither class has a
  # tenth.
  assert np.flatnonzero(digits.is_held_out(labels)).tolist() == [6, 10]


def test_the_splits_are_apart_stratified_and_fixed():
  source = DigitsSource().classes()
  splits = [source.examples(split) for split in ('train', 'validation')]
  counts = np.array([np.bincount(e.labels, minlength=10) for e in splits])
  class_counts = counts.sum(0)
  assert class_counts.sum() == 1797
  np.testing.assert_array_equal(counts[1], class_counts // 5)
  train, validation = (
    {image.tobytes() for image in e.features} for e in splits
  )
  assert not train & validation
  assert splits[0].features.shape[1:] == (8, 8)
  assert splits[0].features.min() == 0 and splits[0].features.max() == 1
  assert source.classes == tuple('0123456789')
  again = DigitsSource().classes().examples('validation')
  np.testing.assert_array_equal(again.features, splits[1].features)
  with pytest.raises(ValueError, match=r"'test'; have \['train'"):
    source.examples('test')
  # Rows of a source without jitter are its images unchanged.
  batch = ClassRows(source, 'train').take(np.array([3]))
  np.testing.assert_array_equal(batch['features'][0], splits[0].features[3])


def test_jitter_moves_whole_images_to_every_place(jittered_source):
  image = jittered_source.examples('train').features[:1]
  image = image + 0.5  # no pixel is background, so that the place shows
  shifted_images = jittered_source.jittered(
    np.repeat(image, 2000, axis=0), np.random.default_rng(0)
  )
  assert shifted_images.shape == (2000, 14, 14)
  ink = shifted_images > 0
  rows, columns = ink.any(2).argmax(1), ink.any(1).argmax(1)
  for i in range(20):
    crop = shifted_images[i, rows[i] : rows[i] + 8, columns[i] : columns[i] + 8]
    np.testing.assert_array_equal(crop, image[0])
  np.testing.assert_array_equal(ink.sum((1, 2)), 64)
  counts = np.bincount(7 * rows + columns, minlength=49)
  # Each place is expected 41 times; five standard deviations are 32.
  assert len(counts) == 49 and counts.min() > 9 and counts.max() < 73


def test_training_sees_new_places_and_evaluation_the_same(jittered_source):
  rows = ClassRows(jittered_source, 'train')
  indices = np.arange(5)
  first = rows.draw(indices, 1, np.full(5, 0))
  later = rows.draw(indices, 1, np.full(5, 1))
  np.testing.assert_array_equal(first['targets'], later['targets'])
  assert (first['features'] != later['features']).any((1, 2)).sum() >= 4
  ink_sums = first['features'].sum((1, 2)), later['features'].sum((1, 2))
  np.testing.assert_allclose(*ink_sums, rtol=1e-5)
  repeated = [rows.take(indices)['features'] for _ in range(2)]
  np.testing.assert_array_equal(*repeated)


def test_a_canvas_has_room():
  with pytest.raises(ValueError, match='canvas=7 must be at least 8'):
    DigitsSource(canvas=7)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sklearn', None)
  with pytest.raises(ValueError, match=r'pip install .moe_jax\[experiments\]'):
    DigitsSource().classes()


class Spots(tfds.core.GeneratorBasedBuilder):
  """A dataset of images in which the pixel of their number is white."""

  VERSION = tfds.core.Version('1.0.0')
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


class Coloured(Spots):
  """The same dataset with three channels."""

  SHAPE = (3, 4, 3)


class Nested(Spots):
  """The same dataset, whose features are within another."""

  def _info(self):
    info = super()._info()
    features = tfds.features.FeaturesDict({'spot': {**info.features}})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _generate_examples(self, numbers):
    for i, example in super()._generate_examples(numbers):
      yield i, {'spot': example}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
  for builder in (Spots, Coloured, Nested):
    dataset = builder(data_dir=tmp_path, file_format='array_record')
    dataset.download_and_prepare()
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))


def test_images_of_tfds_move_by_four_pixels(prepared):
  source = TfdsSource('spots').classes(SPLITS)
  assert source.classes == ('odd', 'even')
  train, validation = map(source.examples, ('train', 'validation'))
  assert (len(train.labels), len(validation.labels)) == (8, 4)
  for features, labels in (train, validation):
    assert features.max(axis=(1, 2)).tolist() == [1.0] * len(labels)
    spot = features.reshape(len(labels), -1).argmax(1)
    np.testing.assert_array_equal(labels, (spot + 1) % 2)
  rng = np.random.default_rng(0)
  shifted_images = source.jittered(
    np.repeat(train.features[:1], 500, axis=0), rng
  )
  assert shifted_images.shape == (500, 11, 12)
  unshifted_source = TfdsSource('spots', max_shift=0).classes(SPLITS)
  np.testing.assert_array_equal(
    unshifted_source.jittered(train.features, rng), train.features
  )
  # Shifts go from 4 pixels up to 4 down, and from 4 left to 4 right.
  row, column = np.divmod(train.features[0].argmax(), 4)
  rows, columns = np.divmod(shifted_images.reshape(500, -1).argmax(1), 12)
  assert (rows.min() - row, rows.max() - row) == (0, 8)
  assert (columns.min() - column, columns.max() - column) == (0, 8)


def test_features_may_be_within_another(prepared):
  nested = TfdsSource(
    'nested', image_feature='spot/image', label_feature='spot/label'
  ).classes(SPLITS)
  plain = TfdsSource('spots').classes(SPLITS)
  assert nested.classes == plain.classes
  for split in ('train', 'validation'):
    for a, b in zip(nested.examples(split), plain.examples(split), strict=True):
      np.testing.assert_array_equal(a, b)


def test_what_tfds_lacks_is_said(prepared):
  with pytest.raises(ValueError, match=r'are \(3, 4, 3\).* to be grey'):
    TfdsSource('coloured').classes(SPLITS)
  with pytest.raises(ValueError, match=r"(?s)'spotz' .*'spots'.*TFDS_DATA_DIR"):
    TfdsSource('spotz').classes(SPLITS)
