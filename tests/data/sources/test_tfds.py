"""TFDS datasets: parts, features within features, and what is not there."""

import pytest

from moe_jax.data import SPLITS, Selection, TfdsSource
from tests.data.conftest import Examples

PARTS = Selection(('train[:75%]', 'train[75%:]'))


def test_parts_of_a_split_and_languages_within_a_feature(tfds_data):
  source = TfdsSource('examples', 'line', 'translation/de', 'summary')
  texts, pairs = source.texts(PARTS), source.pairs(PARTS)
  train, validation = ([*texts.texts(split)] for split in SPLITS)
  assert (len(train), len(validation)) == (15, 5)
  assert sorted(train + validation) == sorted(f'poém {i}' for i in range(20))
  assert '1.2.0' in texts.name
  assert {pair for split in SPLITS for pair in pairs.pairs(split)} == {
    (f'Satz {i} ü', f'short {i}') for i in range(20)
  }


@pytest.mark.parametrize(
  ('inputs', 'targets', 'message'),
  [
    ('lin', 'summary', r"input_feature of 'examples' 'lin'; did you mean"),
    ('translation', 'summary', "did you mean 'translation/"),
    ('line', 'stars', "'stars' 0 of 'examples' has type int"),
    ('line', 'raw', 'is not UTF-8'),
  ],
)
def test_a_feature_that_is_no_text_is_named(
  tfds_data, inputs, targets, message
):
  source = TfdsSource('examples', input_feature=inputs, target_feature=targets)
  with pytest.raises(ValueError, match=message):
    list(source.pairs().pairs('train'))


def test_an_unknown_dataset_names_those_prepared(tfds_data):
  with pytest.raises(ValueError, match=r"'exampels' .*\['examples'\]"):
    TfdsSource('exampels').texts()


def test_a_dataset_that_needs_a_manual_download(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  with pytest.raises(ValueError, match=r"(?s)'samsum' could not .*TensorFlow"):
    TfdsSource('samsum').texts()


def test_what_is_prepared_is_locked_even_in_a_new_folder(tmp_path, monkeypatch):
  folder, is_locked = tmp_path / 'new' / 'tfds', []
  generate = Examples._generate_examples  # noqa: SLF001

  def record_lock(*args):
    is_locked.append((folder / '.examples.lock').exists())
    return generate(*args)

  monkeypatch.setattr(Examples, '_generate_examples', record_lock)
  monkeypatch.setenv('TFDS_DATA_DIR', str(folder))
  TfdsSource('examples', 'line').texts()
  assert is_locked == [True, True]
