"""TFDS datasets as documents of two splits."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax.data import Selection, TfdsSource

TWICE = Selection(('train', 'train'))


def texts(source, split):
  return list(source.texts(split))


class Poems(tfds.core.GeneratorBasedBuilder):
  """A dataset of twenty poems in 'train', without another split."""

  VERSION = tfds.core.Version('1.2.0')

  def _info(self):
    features = {
      'line': tfds.features.Text(),
      'raw': tfds.features.Tensor(shape=(), dtype=np.object_),
      'stars': tfds.features.Tensor(shape=(), dtype=np.int32),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(20):
      yield i, {'line': f'poém {i}', 'raw': b'\xe9', 'stars': i}


@pytest.fixture(scope='module')
def poems_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  builder = Poems(data_dir=folder, file_format='array_record')
  builder.download_and_prepare()
  return folder


@pytest.fixture
def poems(poems_folder, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(poems_folder))

  def open_poems(train='train[:75%]', validation='train[75%:]', text='line'):
    source = TfdsSource('poems', text_feature=text)
    return source.texts(Selection((train, validation)))

  return open_poems


def test_a_prepared_dataset_in_parts(poems):
  source = poems()
  train, validation = texts(source, 'train'), texts(source, 'validation')
  assert (len(train), len(validation)) == (15, 5)
  assert sorted(train + validation) == sorted(f'poém {i}' for i in range(20))
  assert '1.2.0' in source.name
  assert 'tensorflow' not in sys.modules


def test_what_is_selected_changes_the_identity(poems):
  sources = [poems(), poems('train[:50%]'), poems(text='raw'), poems()]
  identities = [source.identity for source in sources]
  assert len(set(identities)) == 3
  assert identities[0] == identities[3]


def test_an_unknown_feature_names_those_that_exist(poems):
  with pytest.raises(ValueError, match=r"'lin'; did you mean 'line'.*'stars'"):
    poems(text='lin')


@pytest.mark.parametrize('split', ['test', 'train[5', 'train[:10%]+test'])
def test_an_unknown_split_names_those_that_exist(poems, split):
  with pytest.raises(ValueError, match=r"unknown split .*have \['train'\]"):
    poems(validation=split)


@pytest.mark.parametrize(
  ('feature', 'message'),
  [('stars', "'stars' 0 of 'poems' has type int"), ('raw', 'is not UTF-8')],
)
def test_a_feature_that_is_no_text(poems, feature, message):
  with pytest.raises(ValueError, match=message):
    texts(poems(text=feature), 'train')


def test_an_unknown_dataset_names_those_prepared(poems):
  with pytest.raises(ValueError, match=r"'poemz' .*\['poems'\]"):
    TfdsSource('poemz').texts()


def test_a_dataset_that_needs_a_manual_download(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  with pytest.raises(ValueError, match=r"(?s)'samsum' could not .*TensorFlow"):
    TfdsSource('samsum').texts()


def test_what_is_prepared_is_locked_even_in_a_new_folder(tmp_path, monkeypatch):
  folder, is_locked = tmp_path / 'new' / 'tfds', []
  generate = Poems._generate_examples  # noqa: SLF001

  def record_lock(*args):
    is_locked.append((folder / '.poems.lock').exists())
    return generate(*args)

  monkeypatch.setattr(Poems, '_generate_examples', record_lock)
  monkeypatch.setenv('TFDS_DATA_DIR', str(folder))
  TfdsSource('poems', text_feature='line').texts(TWICE)
  assert is_locked == [True]


def test_a_dataset_in_another_format(tmp_path, monkeypatch, poems_folder):
  # This is TensorFlow's own default.
  version_folder = tmp_path / 'poems' / '1.2.0'
  version_folder.mkdir(parents=True)
  for path in (poems_folder / 'poems' / '1.2.0').iterdir():
    name = path.name.replace('array_record', 'tfrecord')
    content = path.read_bytes()
    if path.suffix == '.json':
      content = content.replace(b'array_record', b'tfrecord')
    (version_folder / name).write_bytes(content)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  with pytest.raises(ValueError, match=r"'poems'.*array_record"):
    TfdsSource('poems', text_feature='line').texts(TWICE)
