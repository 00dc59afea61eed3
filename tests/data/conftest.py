"""A TFDS dataset for sources of texts, of pairs and of choices."""

import numpy as np
import pytest
import tensorflow_datasets as tfds


class Examples(tfds.core.GeneratorBasedBuilder):
  """Twenty examples in 'train' and five in 'validation', by their numbers."""

  VERSION = tfds.core.Version('1.2.0')

  def _info(self):
    text = tfds.features.Text()
    features = {
      'line': text,
      'summary': text,
      'translation': tfds.features.Translation(languages=['de', 'en']),
      'raw': tfds.features.Tensor(shape=(), dtype=np.object_),
      'stars': tfds.features.Tensor(shape=(), dtype=np.int32),
      # Features of questions, as in ARC and in PIQA.
      'choices': tfds.features.Sequence(text),
      'sol1': text,
      'sol2': text,
      'key': tfds.features.ClassLabel(num_classes=3),
      'truth': np.bool_,
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {
      'train': self._generate_examples(range(20)),
      'validation': self._generate_examples(range(20, 25)),
    }

  def _generate_examples(self, numbers):
    for i in numbers:
      values = {
        'line': f'poém {i}', 'summary': f'short {i}', 'raw': b'\xe9',
        'translation': {'de': f'Satz {i} ü', 'en': f'sentence {i}'},
        'stars': i, 'choices': [f'{c}{i}' for c in 'abc'],
        'sol1': f'no {i}', 'sol2': f'yes {i}', 'key': i % 3, 'truth': i % 2,
      }  # fmt: skip
      yield i, values


@pytest.fixture(scope='session')
def tfds_folder(tmp_path_factory):
  """A folder with the prepared dataset 'examples'."""
  folder = tmp_path_factory.mktemp('tfds')
  Examples(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


@pytest.fixture
def tfds_data(tfds_folder, monkeypatch):
  """Lets TFDS find the prepared dataset 'examples'."""
  monkeypatch.setenv('TFDS_DATA_DIR', str(tfds_folder))
  return tfds_folder
