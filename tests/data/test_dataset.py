"""From options to rows, and which options are refused."""

import dataclasses

import numpy as np
import pytest

from moe_jax.config import read_options, section_of
from moe_jax.data import (
  BytesOptions,
  CharsOptions,
  DataOptions,
  DocstringsSource,
  FilesSource,
  PrefixLmTask,
  PythonStdlibSource,
  Seq2SeqTask,
  TfdsSource,
  load,
  train_batches,
)

PART = PythonStdlibSource('email,json')
CHARS = CharsOptions()


@pytest.fixture
def config(tmp_path):
  """Options that read tmp_path/text/*.txt and cache in tmp_path/cache."""
  (tmp_path / 'text').mkdir()

  def make(tokenizer=BytesOptions(), seq_len=4, **more):
    return DataOptions(
      source=FilesSource(f'{tmp_path}/text/*.txt'),
      tokenizer=tokenizer,
      seq_len=seq_len,
      cache_dir=str(tmp_path / 'cache'),
      **more,
    )

  return make


def test_one_file_of_characters(config, tmp_path):
  # The first 18 of 20 characters are for training; 'd' occurs in validation
  # only.
  (tmp_path / 'text' / 'a.txt').write_text('abc' * 6 + 'dd')
  dataset = load(config(CHARS))
  assert dataset.tokenizer.vocab_size == 4
  train, validation = dataset.splits['train'], dataset.splits['validation']
  assert len(train) == 5  # 17 predictions, 4 in a row
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
  (about_file,) = streams.glob('*/about.json')
  written_ns = about_file.stat().st_mtime_ns
  assert load(config(seq_len=7)).digest == first.digest
  assert about_file.stat().st_mtime_ns == written_ns and count() == 1
  load(config(CHARS))
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
  dataset = load(DataOptions(source=PART, seq_len=33))
  assert 'python_stdlib:email,json of Python 3' in dataset.source
  batch = next(
    train_batches(dataset.splits['train'], batch_size=5, seed=0, start=3)
  )
  assert batch['tokens'].shape == (5, 33)
  text = dataset.tokenizer.decode(batch['tokens'].reshape(-1))
  # The text is Python: 165 characters, mostly lower-case letters and blanks.
  assert sum(c.islower() or c == ' ' for c in text) > 80


def test_empty_sources_are_refused_and_not_kept(config, tmp_path):
  (tmp_path / 'text' / 'a.txt').write_text('')
  with pytest.raises(ValueError, match="'train' has 0 tokens"):
    load(config())
  assert list((tmp_path / 'cache' / 'tokens').iterdir()) == []


def section(**changes):
  """The default options as a config section, with changes by dotted key."""
  config = section_of(DataOptions)
  for key, value in changes.items():
    *parents, key_name = key.replace('__', '.').split('.')
    subsection = config
    for parent in parents:
      subsection = subsection[parent]
    subsection[key_name] = value
  return config


def test_a_section_is_read_and_written_again():
  config = section(
    source__kind='files',
    source__files__pattern='x/*.txt',
    tokenizer__kind='chars',
    task__kind='prefix_lm',
    target_len=7,
  )
  options = DataOptions(
    source=FilesSource('x/*.txt'),
    tokenizer=CharsOptions(),
    task=PrefixLmTask(),
    target_len=7,
  )
  assert read_options(DataOptions, config) == options
  assert read_options(DataOptions, section_of(options)) == options
  assert options.shape.encoder_decoder
  assert not DataOptions().shape.encoder_decoder


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'seq_len': 0}, 'seq_len=0 must be at least 1'),
    (
      {'task__kind': 'ul2', 'target_len': -1},
      'target_len=-1 must be at least 0',
    ),
    ({'source__kind': 'folder'}, "unknown source 'folder'"),
    ({'source__kind': 'file'}, "did you mean 'files'"),
    ({'source__kind': 'files'}, 'source.files.pattern is missing'),
    (
      {'source__kind': 'files', 'source__files__pattern': ''},
      'source.files.pattern',
    ),
    ({'tokenizer__kind': 'byte'}, "unknown tokenizer 'byte'; did you mean 'by"),
    ({'task__kind': 'mlm'}, "unknown task 'mlm'; .*'span_corruption'"),
    (
      {'task__kind': 'ul2', 'task__ul2__denoisers': (('R', 3.0, 0.15),)},
      r'task.ul2.denoisers=.* is a tuple, not tuple\[tuple\[str, float',
    ),
    # Options without effect are refused by name.
    ({'source__files__pattern': 'x'}, "pattern='x' has no effect with"),
    ({'task__ul2__num_sentinels': 3}, 'num_sentinels=3 has no effect with'),
    ({'task__seq2seq__input_prefix': 'a'}, "input_prefix='a' has no effect"),
    ({'target_len': 9}, 'target_len=9 has no effect unless the task'),
    ({'pack': False}, 'pack=False has no effect unless the task'),
    (
      {
        'source__kind': 'tfds',
        'source__tfds__name': 'x',
        'source__tfds__target_feature': 'y',
      },
      "source.tfds.target_feature='y' has no effect where texts are read",
    ),
    # A source must give the kind of data that its task reads.
    (
      {'source__kind': 'django_gettext'},
      "source.kind='django_gettext' gives pairs, task.kind='lm' reads texts; "
      ".*'files', 'python_stdlib', 'tfds'",
    ),
    (
      {'task__kind': 'seq2seq'},
      "gives texts, task.kind='seq2seq' reads pairs; .*; values of task.kind "
      r"that read texts: \[.*'lm'",
    ),
  ],
)
def test_wrong_sections_are_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    read_options(DataOptions, section(**wrong))


@pytest.mark.parametrize(
  ('task', 'source', 'small'),
  [
    (PrefixLmTask(), TfdsSource('x', text_feature='y'), PythonStdlibSource()),
    (
      Seq2SeqTask('sum: '),
      TfdsSource('x', input_feature='y'),
      DocstringsSource(),
    ),
  ],
)
def test_shrunk_options_keep_their_task(task, source, small):
  options = DataOptions(
    source=source, task=task, target_len=114, train_split='train[:9]'
  )
  expected = DataOptions(source=small, task=task, seq_len=32, target_len=24)
  assert options.shrunk() == expected
  lm = dataclasses.replace(options, task=DataOptions().task, target_len=0,
                           source=TfdsSource('x'))  # fmt: skip
  assert lm.shrunk().target_len == 0


def test_a_missing_split_is_named(config, tmp_path):
  (tmp_path / 'text' / 'a.txt').write_text('abc')
  with pytest.raises(ValueError, match="unknown split of files 'test'"):
    load(config(train_split='test'))


def test_a_cut_cache_is_named(config, tmp_path):
  (tmp_path / 'text' / 'a.txt').write_text('abcdefghij' * 2)
  load(config())
  (tokens,) = tmp_path.glob('cache/tokens/*/train.documents.tokens')
  tokens.write_bytes(tokens.read_bytes()[:-1])
  with pytest.raises(ValueError, match=str(tokens.parent)):
    load(config())
