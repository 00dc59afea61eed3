"""From a config to rows, with everything between."""

import numpy as np
import pytest

from moe_jax.data import DataConfig, load, train_batches

PART = 'python_stdlib:email,json'


@pytest.fixture
def config(tmp_path):
  """Reads tmp_path/text/*.txt, caches in tmp_path/cache."""
  (tmp_path / 'text').mkdir()

  def make(tokenizer='bytes', seq_len=4, **more):
    return DataConfig(
      source=f'files:{tmp_path}/text/*.txt',
      tokenizer=tokenizer,
      seq_len=seq_len,
      cache_dir=str(tmp_path / 'cache'),
      **more,
    )

  return make


def test_one_file_of_characters(config, tmp_path):
  # The first 18 of 20 characters train; d is seen in validation alone.
  (tmp_path / 'text' / 'a.txt').write_text('abc' * 6 + 'dd')
  dataset = load(config('chars'))
  assert dataset.tokenizer.vocab_size == 4
  train, validation = dataset.splits['train'], dataset.splits['validation']
  assert len(train) == 5  # 17 predictions, 4 a row
  assert train[0]['tokens'].tolist() == [0, 1, 2, 0]
  assert train[0]['targets'].tolist() == [1, 2, 0, 1]
  assert sum(row['loss_weights'].sum() for row in train) == 17
  assert validation[0]['tokens'].tolist() == [3, 3, 0, 0]
  assert validation[0]['segment_ids'].tolist() == [1, 1, 0, 0]


def test_describe_says_what_is_trained_on(config, tmp_path):
  for name in ('a', 'b'):
    (tmp_path / 'text' / f'{name}.txt').write_text('héllo')
  dataset = load(config())
  text = dataset.describe()
  assert f'2 documents, 12 bytes, sha256 {dataset.digest}' in text
  assert 'V=257' in text
  assert 'train: 1 documents, 6 bytes, 7 tokens, 2 rows of T=4' in text
  assert 'validation: 1 documents, 6 bytes, 7 tokens, 2 rows of T=4' in text


def test_tokens_are_kept_until_the_content_changes(config, tmp_path):
  path = tmp_path / 'text' / 'a.txt'
  streams = tmp_path / 'cache' / 'tokens'

  def count():
    return len(list(streams.iterdir()))

  path.write_text('abcdefghij' * 2)
  first = load(config())
  (about,) = streams.glob('*/about.json')
  written = about.stat().st_mtime_ns
  assert load(config(seq_len=7)).digest == first.digest
  assert about.stat().st_mtime_ns == written and count() == 1
  load(config('chars'))
  assert count() == 2
  path.write_text('abcdefghiJ' * 2)
  changed = load(config())
  assert changed.digest != first.digest and count() == 3
  swapped = config(train_split='validation', validation_split='train')
  tokens = load(swapped).splits['train'][0]['tokens']
  np.testing.assert_array_equal(
    tokens, changed.splits['validation'][0]['tokens']
  )


def test_the_embedded_corpus_feeds_training():
  dataset = load(DataConfig(PART, 'bytes', 33))
  assert f'{PART} of Python 3' in dataset.source
  batch = next(
    train_batches(dataset.splits['train'], batch_size=5, seed=0, start=3)
  )
  assert batch['tokens'].shape == (5, 33)
  text = dataset.tokenizer.decode(batch['tokens'].reshape(-1))
  # Python, not noise: 165 characters, mostly lower-case letters and blanks.
  assert sum(c.islower() or c == ' ' for c in text) > 80


def test_empty_sources_are_refused_and_not_kept(config, tmp_path):
  (tmp_path / 'text' / 'a.txt').write_text('')
  with pytest.raises(ValueError, match="'train' has 0 tokens"):
    load(config())
  assert list((tmp_path / 'cache' / 'tokens').iterdir()) == []


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'seq_len': 0}, 'seq_len=0'),
    ({'source': 'folder:x'}, "unknown source 'folder:x'"),
    ({'tokenizer': 'words'}, "unknown tokenizer 'words'"),
    ({'train_split': 'test'}, 'unknown split'),
    ({'text_feature': 'txt'}, "'txt'; did you mean 'text'"),
  ],
)
def test_wrong_configs(wrong, message, tmp_path):
  right = {'source': PART, 'tokenizer': 'bytes', 'seq_len': 8}
  cache = {'cache_dir': str(tmp_path)}
  with pytest.raises(ValueError, match=message):
    load(DataConfig(**right | cache | wrong))


def test_a_cut_cache_is_named(config, tmp_path):
  (tmp_path / 'text' / 'a.txt').write_text('abcdefghij' * 2)
  load(config())
  (tokens,) = tmp_path.glob('cache/tokens/*/train.tokens')
  tokens.write_bytes(tokens.read_bytes()[:-1])
  with pytest.raises(ValueError, match=str(tokens.parent)):
    load(config())
