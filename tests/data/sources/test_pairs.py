"""Pairs of texts in two splits, from docstrings, translations and TFDS."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax.data import DocstringsSource, GettextSource, Selection, TfdsSource

PART = DocstringsSource('asyncio,email,json')


def pairs(source, split):
  return list(source.pairs(split))


def test_a_part_of_the_standard_librarys_docstrings():
  source = PART.pairs()
  train, validation = pairs(source, 'train'), pairs(source, 'validation')
  assert len(train) > 100 and len(validation) > 5
  assert pairs(source, 'train') == train
  docstrings = dict(train + validation)
  (loads,) = (i for i in docstrings if i.startswith('def loads('))
  assert docstrings[loads].startswith('Deserialize ``s``')
  assert 'Deserialize' not in loads and 'return cls(**kw)' in loads
  assert 'asyncio,email,json of Python 3' in source.name
  assert DocstringsSource('json').pairs().identity != source.identity
  assert 'tensorflow' not in sys.modules


def test_translations_and_a_prefix():
  plain = GettextSource('de,fr').pairs()
  source = plain.with_prefix('translate to ')
  train = dict(pairs(source, 'train'))
  assert train['translate to fr: Password'] == 'Mot de passe'
  assert train['translate to de: Password'] == 'Passwort'
  expected = [(f'translate to {i}', t) for i, t in pairs(plain, 'train')]
  assert list(train.items()) == expected
  assert plain.identity != source.identity
  assert '(2 languages)' in source.name
  swapped = GettextSource('de,fr').pairs(Selection(('validation', 'train')))
  assert pairs(swapped, 'train') == pairs(plain, 'validation')


def test_translations_have_two_splits():
  with pytest.raises(ValueError, match="'test'; have"):
    GettextSource().pairs(Selection(('train', 'test')))


class Phrases(tfds.core.GeneratorBasedBuilder):
  """A dataset of twenty pairs, with a translation and a summary each."""

  VERSION = tfds.core.Version('2.1.0')

  def _info(self):
    features = {
      'translation': tfds.features.Translation(languages=['de', 'en']),
      'document': tfds.features.Text(),
      'summary': tfds.features.Text(),
      'stars': tfds.features.Tensor(shape=(), dtype=np.int32),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(20):
      yield (
        i,
        {
          'translation': {'de': f'Satz {i} ü', 'en': f'sentence {i}'},
          'document': f'long {i}',
          'summary': f'short {i}',
          'stars': i,
        },
      )


class Bare(Phrases):
  """A dataset whose features are a translation, as in WMT."""

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.Translation(languages=['de', 'en']),
    )

  def _generate_examples(self):
    for i in range(7):
      yield i, {'de': f'Satz {i}', 'en': f'sentence {i}'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  for builder in (Phrases, Bare):
    builder(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


@pytest.fixture
def open_tfds(folder, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(folder))

  def open_pairs(inputs, targets, name='phrases'):
    source = TfdsSource(name, input_feature=inputs, target_feature=targets)
    return source.pairs(Selection(('train[:75%]', 'train[75%:]')))

  return open_pairs


def test_features_of_a_tfds_dataset(open_tfds):
  source = open_tfds('document', 'summary').with_prefix('summarize: ')
  train, validation = pairs(source, 'train'), pairs(source, 'validation')
  assert (len(train), len(validation)) == (15, 5)
  assert sorted(train + validation) == sorted(
    (f'summarize: long {i}', f'short {i}') for i in range(20)
  )
  assert '2.1.0' in source.name and 'document to summary' in source.name
  assert 'tensorflow' not in sys.modules


def test_languages_within_a_feature_and_at_the_top(open_tfds):
  source = open_tfds('translation/de', 'translation/en')
  all_pairs = pairs(source, 'train') + pairs(source, 'validation')
  assert sorted(all_pairs) == sorted(
    (f'Satz {i} ü', f'sentence {i}') for i in range(20)
  )
  source = open_tfds('en', 'de', name='bare')
  all_pairs = pairs(source, 'train') + pairs(source, 'validation')
  assert sorted(all_pairs) == [(f'sentence {i}', f'Satz {i}') for i in range(7)]


def test_what_is_selected_changes_the_identity(open_tfds):
  identities = {
    open_tfds(*features).with_prefix(prefix).identity
    for features in (('document', 'summary'), ('summary', 'document'))
    for prefix in ('', 'x')
  }
  assert len(identities) == 4


@pytest.mark.parametrize(
  ('inputs', 'targets', 'message'),
  [
    ('inputs', 'summary', r"input_feature of 'phrases' 'inputs'.*'document'"),
    ('document', 'de', "target_feature .*'de'.*'translation/de'"),
    ('translation', 'summary', "did you mean 'translation/"),
    ('document', 'stars', "'stars' 0 of 'phrases' has type int"),
  ],
)
def test_wrong_features_name_those_that_exist(
  open_tfds, inputs, targets, message
):
  with pytest.raises(ValueError, match=message):
    pairs(open_tfds(inputs, targets), 'train')


def test_an_unknown_language_or_module():
  with pytest.raises(ValueError, match="'pt_PT'; did you mean 'pt"):
    GettextSource('de,pt_PT').pairs()
  with pytest.raises(ValueError, match="'jsn'; did you mean 'json'"):
    DocstringsSource('jsn').pairs()
