"""From options to rows by hand, and options that contradict each other."""

import dataclasses

import pytest

from moe_jax.data import (
  BytesOptions,
  CharsOptions,
  DataOptions,
  DocstringsSource,
  FilesSource,
  GettextSource,
  MixtureOptions,
  PrefixLmTask,
  PythonStdlibSource,
  Seq2SeqTask,
  TfdsSource,
  load,
)

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
  text = dataset.describe()
  assert f'2 documents, 20 bytes, sha256 {dataset.digest}' in text
  assert 'V=4' in text
  assert 'train: 1 documents, 18 bytes, 18 tokens, 5 rows of T=4' in text


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
  assert tokens.tolist() == changed.splits['validation'][0]['tokens'].tolist()


PAIRS = GettextSource()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'target_len': 9}, 'target_len=9 has no effect unless the task'),
    ({'pack': False}, 'pack=False has no effect unless the task'),
    (
      {'source': TfdsSource('x', target_feature='y')},
      "source.tfds.target_feature='y' has no effect where texts are read",
    ),
    (
      {'source': PAIRS},
      "source.kind='django_gettext' gives pairs, task.kind='lm' reads texts; "
      ".*'files', 'python_stdlib', 'tfds'",
    ),
    (
      {'task': Seq2SeqTask()},
      "gives texts, task.kind='seq2seq' reads pairs; .*; values of task.kind "
      r"that read texts: \[.*'lm'",
    ),
    (
      {'mixture': MixtureOptions(sources={'a': PAIRS})},
      "mixture.sources.a.kind='django_gettext' gives pairs",
    ),
    (
      {'mixture': MixtureOptions(sources={'a': PAIRS}), 'source': PAIRS},
      "source.kind='django_gettext' has no effect with sources in",
    ),
  ],
)
def test_what_contradicts_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    DataOptions(**options)


def test_shrunk_options_keep_their_task():
  for task, source, small in (
    (PrefixLmTask(), TfdsSource('x', text_feature='y'), PythonStdlibSource()),
    (Seq2SeqTask(), TfdsSource('x', input_feature='y'), DocstringsSource()),
  ):
    options = DataOptions(
      source=source, task=task, target_len=114, train_split='train[:9]'
    )
    expected = DataOptions(source=small, task=task, seq_len=32, target_len=24)
    assert options.shrunk() == expected
  decoder = dataclasses.replace(options, target_len=0)
  assert decoder.shrunk().target_len == 0
