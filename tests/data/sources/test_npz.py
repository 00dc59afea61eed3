"""Examples with classes from npz files: unchanged, augmented, refused."""

import numpy as np
import pytest

from moe_jax.data import (
  ClassesTask,
  ClassRows,
  ClassSource,
  DataOptions,
  Examples,
  NpzSource,
  load,
  tokenizers,
  train_batches,
)


def write_npz(path, **changes):
  """Writes three training and two validation examples; returns the source."""
  arrays = {
    'train_features': np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    'train_labels': np.array([0, 1, 1]),
    'validation_features': np.array([[7.0, 8.0], [9.0, 10.0]]),
    'validation_labels': np.array([1, 0]),
    'classes': np.array(['ah', 'ee']),
  }
  arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
  np.savez(path, **arrays)
  return NpzSource(str(path))


def dataset_of(source):
  return load(DataOptions(source=source, task=ClassesTask(), seq_len=1))


def test_examples_are_rows_of_one(tmp_path):
  dataset = dataset_of(write_npz(tmp_path / 'a.npz'))
  assert dataset.vocab_size == 2 and dataset.feature_shape == (2,)
  batch = dataset.splits['train'].take(np.array([2, 0, 3]))
  # There are three examples, so that the fourth row is padding.
  np.testing.assert_array_equal(batch['features'], [[5, 6], [1, 2], [0, 0]])
  np.testing.assert_array_equal(batch['targets'], [[1], [0], [0]])
  np.testing.assert_array_equal(batch['segment_ids'], [[1], [1], [0]])
  np.testing.assert_array_equal(batch['loss_weights'], [[1], [1], [0]])
  assert batch['features'].dtype == batch['loss_weights'].dtype == np.float32
  description = dataset.describe()
  assert 'data: classes of a.npz, 5 examples, sha256 ' in description
  assert 'train: 3 examples, 3 examples of (2,)' in description


def test_the_digest_is_of_all_that_is_learned(tmp_path):
  def digest(**changes):
    return dataset_of(write_npz(tmp_path / 'a.npz', **changes)).digest

  first = digest()
  assert digest() == first
  assert digest(train_labels=np.array([0, 1, 0])) != first
  assert digest(validation_features=np.zeros((2, 2))) != first


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(train_labels=np.array([0, 1])), "3 features and 2 labels of 'train'"),
    (dict(train_labels=np.array([0, 2, 1])), 'labels from 0 to 2 of 2 classes'),
    (
      dict(validation_features=np.zeros((2, 3))),
      r'\(2,\) in training and \(3,\)',
    ),
    (dict(train_features=None), "unknown array.*'train_features'.*'classes'"),
    (
      dict(train_labels=np.array([{}, 1, 1], object)),
      "'train_labels' holds objects",
    ),
  ],
)
def test_a_bad_file_is_refused(changes, message, tmp_path):
  source = write_npz(tmp_path / 'a.npz', **changes)
  with pytest.raises(ValueError, match=message):
    source.classes()


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'no file .*none\.npz'):
    NpzSource(f'{tmp_path}/none.npz').classes()


class Noisy(ClassSource):
  """Examples of zeros, to which each draw adds a random number."""

  name, classes = 'noise', ('a', 'b')

  def examples(self, split):
    del split
    return Examples(np.zeros((3, 2), np.float32), np.array([0, 1, 0], np.int32))

  def jittered(self, features, generator):
    return features + generator.random(dtype=np.float32)


def test_what_moves_is_a_function_of_row_epoch_and_seed():
  rows = ClassRows(Noisy(), 'train')

  def draw(indices, seed, epochs):
    batch = rows.draw(np.array(indices), seed, np.array(epochs))
    return batch['features'][:, 0].tolist()

  row_1, row_2 = draw([1, 2], 7, [4, 4])
  assert draw([2, 0, 1], 7, [4, 4, 4])[::2] == [row_2, row_1]
  other_draws = draw([1, 1, 0], 7, [4, 5, 4]) + draw([1], 8, [4])
  assert other_draws[0] == row_1 and len(set(other_draws)) == 4
  # An evaluation gets the same examples each time.
  for _ in range(2):
    eval_features = rows.take(np.array([1, 5]))['features'][:, 0].tolist()
    assert eval_features == [draw([1], 0, [0])[0], 0.0]


def test_batches_of_classes_are_drawn_anew_each_epoch():
  batches = train_batches(
    ClassRows(Noisy(), 'train'), batch_size=3, seed=1, start=0
  )
  first, second = (next(batches) for _ in range(2))
  assert sorted(first['targets'][:, 0]) == [0, 0, 1]
  assert not set(first['features'][:, 0]) & set(second['features'][:, 0])


def test_names_of_classes_are_a_vocabulary(tmp_path):
  class_names = tokenizers.ClassNames(('ah', 'ee'), (2,))
  class_names.save(tmp_path / 't.json')
  copy = tokenizers.load(tmp_path / 't.json')
  assert copy.identity == class_names.identity and copy.vocab_size == 2
  assert copy.feature_shape == (2,)
  assert copy.identity != tokenizers.ClassNames(('ee', 'ah')).identity
  assert copy.encode('ee').tolist() == [1] and copy.decode([1, 0]) == 'ee ah'
  with pytest.raises(ValueError, match=r"class 'oo' not in \['ah', 'ee'\]"):
    copy.encode('oo')
