"""Data that is wrong, damaged, or would turn into other data."""

import json
import os
import pathlib
import socket
import time

import numpy as np
import pytest

from moe_jax.data import (
  ChoiceFilesSource,
  ClassesTask,
  ClassRows,
  ClassSource,
  DataOptions,
  Examples,
  FilesSource,
  NpzSource,
  TfdsSource,
  cache_folders,
  load,
  store,
  tokenizers,
)
from tests.bad_inputs.cases import Case, check, frozen

NAN, INFINITY = float('nan'), float('inf')
GOOD = {
  'train_features': np.arange(6.0).reshape(3, 2),
  'train_labels': np.array([0, 1, 1]),
  'validation_features': np.arange(4.0).reshape(2, 2),
  'validation_labels': np.array([1, 0]),
}


def npz(name, phrases, **changes):
  def call(folder):
    arrays = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    path = folder / 'a.npz'
    np.savez(path, **arrays)
    frozen(folder)
    NpzSource(str(path)).classes()

  return Case(f'npz:{name}', call, ('a.npz', *phrases))


def labels(values, *phrases, dtype=None, **more):
  array = np.array(values, dtype)
  return npz(f'labels {values}', phrases, train_labels=array, **more)


def features(values, *phrases, dtype=None):
  array = np.array(values, dtype)
  name = f'features {array.dtype} {array.shape} {values!r:.30}'
  return npz(name, phrases, train_features=array)


NPZ = [
  labels([0, 1, 2**32], 'from 0 to 4294967296', 'int32'),
  labels([0, 1, 2**32 + 1], 'from 0 to 4294967297', 'int32'),
  labels([0, 1, 2**63], 'to 9223372036854775808', dtype=np.uint64),
  labels([0, 1, -1], 'from -1'),
  labels([0, 1, -(2**32)], 'from -4294967296'),
  labels([0, 1, 10**9], 'a label of 1000000000', 'than there are examples, 5'),
  labels([0, 1, 2**31 - 1], 'a label of 2147483647'),
  labels([0, 1, 5], 'a label of 5', 'examples, 5'),
  labels([0, 1, 2], 'labels from 0 to 2 of 2', classes=np.array(['a', 'b'])),
  labels([True, False, True], 'of bool'),
  labels([0.0, 1.0, 1.0], 'of float64'),
  labels([0, 1, NAN], 'of float64'),
  labels(['a', 'b', 'b'], 'of <U1'),
  labels([1j, 0, 1], 'of complex128'),
  labels([[0], [1], [1]], '(3, 1)'),
  labels(1, '()'),
  labels([], '0 labels', dtype=np.int64),
  labels([0, 1], '3 features and 2 labels'),
  labels([0, 1, {}], "'train_labels' holds objects", dtype=object),
  labels(['2020-01-01'] * 3, 'of datetime64', dtype='datetime64[D]'),
  features([[1j, 1], [1, 1], [1, 1]], 'of complex128'),
  features([[True, False]] * 3, 'of bool'),
  features([[NAN, 1], [1, 1], [1, INFINITY]], '2 values', 'first at [0, 0]'),
  features([[1, 1], [1, -INFINITY], [1, 1]], '1 values', 'first at [1, 1]'),
  features([[1e39, 1], [1, 1], [1, 1]], '1 values', 'float32'),
  features([['a', 'b']] * 3, 'of <U1'),
  features([[{}, 1]] * 3, "'train_features' holds objects", dtype=object),
  features([1.0, 2.0, 3.0], '(3,)'),
  features(1.0, '()'),
  features(np.zeros((3, 0)), '3 features and 3 labels'),
  features(np.zeros((0, 2)), '0 features and 3 labels'),
  features(np.zeros((3, 3)), 'shape (3,) in training and (2,) in validation'),
  features([['2020-01-01', '2020-01-01']] * 3, 'datetime', dtype='M8[D]'),
  npz('none', ["'train_features'"], train_features=None),
  npz('classes of numbers', ['names [C]'], classes=np.array([0.5, 1.5])),
  npz('classes in two ranks', ['names [C]'], classes=np.array([['a', 'b']])),
  npz('classes of objects', ["'classes' holds"], classes=np.array([{}, 1])),
  npz('classes of bytes', ['names [C]'], classes=np.array([b'a', b'b'])),
  npz('no classes', ['of 0 classes'], classes=np.array([], '<U1')),
]


def npz_file(name, content, *phrases):
  def call(folder):
    path = folder / 'a.npz'
    path.write_bytes(content)
    frozen(folder)
    NpzSource(str(path)).classes()

  return Case(
    f'npz file: {name}', call, ('a.npz', 'npz file of arrays', *phrases)
  )


def npy(array, **options):
  import io

  file = io.BytesIO()
  np.save(file, array, **options)
  return file.getvalue()


NPZ_FILES = [
  npz_file('empty', b''),
  npz_file('text', b'hello'),
  npz_file('zip cut', b'PK\x03\x04' + bytes(40)),
  npz_file('one array', npy(np.zeros(3)), 'a single array'),
  npz_file('one pickle', npy(np.array([{}]), allow_pickle=True), 'never'),
  npz_file('pickle', b'\x80\x04}\x94.', 'objects are never unpickled'),
  Case('npz file: folder', lambda f: NpzSource(str(f)).classes(), ('no file',)),
  Case(
    'npz file: pipe',
    lambda f: os.mkfifo(f / 'p') or NpzSource(str(frozen(f) / 'p')).classes(),
    ('no file',),
  ),
]


class OwnSource(ClassSource):
  """A source of a user's own, which keeps no contract."""

  name, classes = 'own', ('a', 'b')

  def __init__(self, features, labels):
    self.features_and_labels = features, labels

  def examples(self, split):
    del split
    return Examples(*self.features_and_labels)


def own_source(name, features, labels, *phrases):
  def call(folder):
    del folder
    ClassRows(OwnSource(features, labels), 'train')

  return Case(f'own: {name}', call, ("'train' of own", *phrases))


OWN_SOURCES = [
  own_source('nan', np.full((2, 1), NAN), np.zeros(2, int), '2 values'),
  own_source(
    'label', np.zeros((2, 1)), np.array([0, 2]), 'label 2 is none of 2'
  ),
  own_source('wrapped', np.zeros((2, 1)), np.array([0, 2**32]), 'int32'),
  own_source('booleans', np.zeros((2, 1), bool), np.array([0, 1]), 'of bool'),
  own_source('floats', np.zeros((2, 1)), np.array([0.0, 1.0]), 'of float64'),
  own_source('empty', np.zeros((0, 1)), np.zeros(0, int), '0 labels'),
  own_source('lists', [[0.0], [1.0]], ['a', 'b'], 'of <U1'),
]


class Ids(tokenizers.Bytes, kind='ids of a test'):
  """A tokenizer whose ids are not of its vocabulary."""

  def __init__(self, *ids, dtype=np.int64):
    self.ids = np.array(ids, dtype)

  def encode(self, text):
    del text
    return self.ids


def token_stream(name, texts, tokenizer, *phrases, pairs=False):
  def call(folder):
    write = store.write_pairs if pairs else store.write_tokens
    try:
      write(folder, {'train': texts, 'validation': texts}, tokenizer)
    finally:
      for path in folder.iterdir():  # begun files are those of `prepared`
        path.unlink()

  return Case(f'stored: {name}', call, phrases)


IN_RANGE = '[0, vocab_size=257)'
STORED = [
  token_stream('ids beyond', ['a'], Ids(1, 257), 'from 1 to 257', IN_RANGE),
  token_stream('ids that wrap', ['a'], Ids(2**16), 'to 65536', IN_RANGE),
  token_stream('ids of 4e9', ['a'], Ids(4 * 10**9), '4000000000', IN_RANGE),
  token_stream('negative ids', ['a'], Ids(1, -1), 'from -1', IN_RANGE),
  token_stream('ids of floats', ['a'], Ids(1, dtype=float), 'float64'),
  token_stream('ids of booleans', ['a'], Ids(1, dtype=bool), 'bool'),
  token_stream('numbers', ['a', 3], tokenizers.Bytes(), '3, which is no text'),
  token_stream('null', [None], tokenizers.Bytes(), 'None, which is no text'),
  token_stream('bytes', [b'a'], tokenizers.Bytes(), "b'a', which is no text"),
  token_stream('half a pair', ['a\ud800'], tokenizers.Bytes(), 'surrogates'),
  token_stream('pairs', [('a', 3)], tokenizers.Bytes(), '3, which', pairs=True),
  token_stream('empty', [], tokenizers.Bytes(), "'train' has 0 tokens"),
]


def lines(content, *phrases):
  def call(folder):
    path = folder / 'q.jsonl'
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(raw)
    frozen(folder)
    ChoiceFilesSource(str(path)).items()

  return Case(f'jsonl:{content[:70]!r}', call, ('q.jsonl', *phrases))


def item(**changes):
  values = {'prompt': 'p', 'answers': ['a', 'b'], 'label': 0, **changes}
  return json.dumps({k: v for k, v in values.items() if v is not ...})


JSONL = [
  lines(b'\xff\xfe{}', 'is not UTF-8'),
  lines(item().encode() + b'\n\xe9', 'is not UTF-8'),
  lines('{', 'line 1 is no JSON'),
  lines(item() + '\n\n{', 'line 3 is no JSON'),
  lines('[' * 10**5, 'line 1 is no JSON', 'nested too deeply'),
  lines('{"label": NaN}', 'NaN'),
  lines('{"label": ' + '9' * 5000 + '}', 'line 1 is no JSON'),
  lines('[]', 'is no object with'),
  lines('3', 'is no object with'),
  lines('null', 'is no object with'),
  lines('', 'are empty'),
  *(lines(item(**{k: ...}), 'is no object') for k in ('prompt', 'label')),
  *(
    lines(item(label=v), f'label={v!r} is no')
    for v in (True, False, 2, -1, 0.0, '0', None, [0], 4 * 10**9)
  ),
  *(
    lines(item(prompt=v), f'prompt={v!r} is to be')
    for v in (3, None, '', [], {}, True)
  ),
  *(
    lines(item(answers=v), 'answers=')
    for v in (3, None, 'ab', [], ['a'], ['a', 'a'], ['a', 3], ['a', ''], {})
  ),
  lines(item(prompt='a\ud800'), 'a half of a character'),
]


def text_files(name, write, *phrases):
  def call(folder):
    write(folder)
    options = DataOptions(
      source=FilesSource(str(folder / '*.txt')),
      cache_dir=str(folder / 'cache'),
    )
    try:
      load(options)
    finally:
      for path in sorted(folder.rglob('*'), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()

  return Case(f'files: {name}', call, phrases)


def bytes_of(content, *names):
  return lambda folder: [(folder / n).write_bytes(content) for n in names]


FILES = [
  text_files('none', lambda folder: None, 'no file matches', '*.txt'),
  text_files('bad UTF-8', bytes_of(b'\xff' * 9, 'a.txt'), 'a.txt is not UTF-8'),
  text_files(
    'UTF-16', bytes_of('abc'.encode('utf-16'), 'b.txt'), 'b.txt is no'
  ),
  text_files('empty', bytes_of(b'', 'c.txt'), '0 tokens'),
  text_files('pipe', lambda f: os.mkfifo(f / 'p.txt'), 'no file matches'),
  text_files('folder', lambda f: (f / 'd.txt').mkdir(), 'no file matches'),
]


@pytest.mark.parametrize(
  'case', [*NPZ, *NPZ_FILES, *OWN_SOURCES, *STORED, *JSONL, *FILES], ids=Case.id
)
def test_refused(case, tmp_path):
  check(case, tmp_path)


def test_labels_with_names_may_be_rare(tmp_path):
  classes = np.array([f'c{i}' for i in range(9)])
  arrays = {**GOOD, 'train_labels': np.array([0, 8, 1]), 'classes': classes}
  np.savez(tmp_path / 'a.npz', **arrays)
  options = DataOptions(
    source=NpzSource(str(tmp_path / 'a.npz')), task=ClassesTask(), seq_len=1
  )
  assert load(options).vocab_size == 9


# The cache of token streams follows.


def cached(folder: pathlib.Path) -> tuple[DataOptions, pathlib.Path]:
  """Options whose tokens are in a cache, and the folder of the tokens."""
  (folder / 'a.txt').write_text('to be or not to be ' * 20)
  options = DataOptions(
    source=FilesSource(str(folder / 'a.txt')), cache_dir=str(folder / 'cache')
  )
  load(options)
  (tokens,) = (folder / 'cache' / 'tokens').iterdir()
  return options, tokens


def flips(tokens: pathlib.Path, step: int):
  """Flips a bit of each file at every `step`th byte, one after another."""
  for path in sorted(tokens.iterdir()):
    good = path.read_bytes()
    assert good or path.suffix == '.lock'
    for index in range(0, len(good), step):
      changed = bytearray(good)
      changed[index] ^= 1 << (index % 8)
      path.write_bytes(changed)
      yield path, index
    path.write_bytes(good)


def test_a_bit_flip_anywhere_in_the_cache_is_found(tmp_path):
  options, tokens = cached(tmp_path)
  count = 0
  for path, index in flips(tokens, 53):
    with pytest.raises(ValueError, match='is damaged') as error:
      load(options)
    assert f'{tokens} is damaged' in str(error.value), (path, index)
    assert 'delete the folder, and it is made anew' in str(error.value)
    count += 1
  assert count > 30
  load(options)  # all is as it was


@pytest.mark.slow
def test_every_byte_of_the_cache_counts(tmp_path):
  _, tokens = cached(tmp_path)
  for _ in flips(tokens, 1):
    with pytest.raises(ValueError, match='is damaged'):
      cache_folders.prepared(tokens, lambda _: pytest.fail('made anew'))


@pytest.mark.parametrize(
  ('damage', 'phrase'),
  [
    (lambda t: (t / 'files.json').unlink(), 'files.json is missing'),
    (lambda t: (t / 'files.json').write_text(''), 'is no JSON'),
    (lambda t: (t / 'files.json').write_text('[' * 10**5), 'nested too'),
    (lambda t: (t / 'files.json').write_text('[]\n'), 'not as it was'),
    (lambda t: (t / 'files.json').write_text('3\n'), 'delete the folder'),
    (lambda t: (t / 'about.json').unlink(), 'about.json is missing'),
    (lambda t: (t / 'about.json').write_text('{}'), 'about.json has 2 bytes'),
    (lambda t: (t / 'tokenizer.json').unlink(), 'tokenizer.json is missing'),
    (lambda t: (t / 'train.starts').write_bytes(b''), 'has 0 bytes, not 8'),
    (lambda t: os.truncate(t / 'train.tokens', 4), 'train.tokens has 4 bytes'),
  ],
)
def test_a_damaged_cache_is_named(damage, phrase, tmp_path):
  options, tokens = cached(tmp_path)
  damage(tokens)
  with pytest.raises(ValueError, match='delete the folder') as error:
    load(options)
  assert phrase in str(error.value)
  for path in tokens.iterdir():
    path.unlink()
  tokens.rmdir()
  load(options)  # as the message advises


def test_digests_of_large_files_can_be_left_out(tmp_path, monkeypatch):
  options, tokens = cached(tmp_path)
  fast = DataOptions(
    source=options.source, cache_dir=options.cache_dir, cache_digests=False
  )
  flipped = bytearray((tokens / 'train.tokens').read_bytes())
  flipped[0] ^= 1
  (tokens / 'train.tokens').write_bytes(flipped)
  with pytest.raises(ValueError, match=r'train\.tokens has changed since'):
    load(fast)  # as the file is small
  monkeypatch.setattr(cache_folders, 'SMALL', 100)
  load(fast)
  with pytest.raises(ValueError, match=r'train\.tokens has changed since'):
    load(options)
  os.truncate(tokens / 'train.tokens', 4)
  with pytest.raises(ValueError, match='has 4 bytes'):
    load(fast)


@pytest.mark.slow
def test_without_a_network_tfds_says_so_within_seconds(tmp_path, monkeypatch):
  def fail(*args, **more):
    raise socket.gaierror(-2, 'Name or service not known')

  monkeypatch.setattr(socket, 'getaddrinfo', fail)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  began = time.monotonic()
  with pytest.raises(ValueError, match='no connection to storage') as error:
    TfdsSource('mnist').classes()
  assert len(str(error.value).splitlines()) <= 3
  assert time.monotonic() - began < 30  # it was 205 s
