"""Data that is wrong, damaged, or would turn into other data."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from moe_jax.data import (
  ChoiceFilesSource,
  DataOptions,
  FilesSource,
  cache_folders,
  load,
  tokenizers,
)
from moe_jax.interop.verifying import read_npz
from tests.bad_inputs.cases import Case, check, frozen
from tests.data import stored

NAN, INFINITY = float('nan'), float('inf')


def npz_file(name, content, *phrases):
  def call(folder):
    path = folder / 'a.npz'
    path.write_bytes(content)
    frozen(folder)
    read_npz(path)

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
  Case('npz file: folder', read_npz, ('no file',)),
  Case(
    'npz file: pipe',
    lambda f: os.mkfifo(f / 'p') or read_npz(frozen(f) / 'p'),
    ('no file',),
  ),
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
    write = stored.write_pairs if pairs else stored.write_tokens
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
    ChoiceFilesSource(str(path)).items('validation')

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
  'case', [*NPZ_FILES, *STORED, *JSONL, *FILES], ids=Case.id
)
def test_refused(case, tmp_path):
  check(case, tmp_path)


# The cache of token streams follows.

TOKENS = 'train.documents.tokens'


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
    (
      lambda t: (t / 'tokenizer.json').unlink(),
      'tokenizer.json is missing',
    ),
    (
      lambda t: (t / 'train.documents.starts').write_bytes(b''),
      'has 0 bytes, not 8',
    ),
    (lambda t: os.truncate(t / TOKENS, 4), f'{TOKENS} has 4 bytes'),
  ],
)
def test_a_damaged_cache_is_named(damage, phrase, tmp_path):
  options, tokens = cached(tmp_path)
  damage(tokens)
  with pytest.raises(ValueError, match='delete the folder') as error:
    load(options)
  assert phrase in str(error.value)
  shutil.rmtree(tokens)
  load(options)  # as the message advises


def test_digests_of_large_files_can_be_left_out(tmp_path, monkeypatch):
  options, tokens = cached(tmp_path)
  fast = DataOptions(
    source=options.source, cache_dir=options.cache_dir, cache_digests=False
  )
  flipped = bytearray((tokens / TOKENS).read_bytes())
  flipped[0] ^= 1
  (tokens / TOKENS).write_bytes(flipped)
  with pytest.raises(ValueError, match=r'train.*tokens has changed since'):
    load(fast)  # as the file is small
  monkeypatch.setattr(cache_folders, 'SMALL', 100)
  load(fast)
  with pytest.raises(ValueError, match=r'train.*tokens has changed since'):
    load(options)
  os.truncate(tokens / TOKENS, 4)
  with pytest.raises(ValueError, match='has 4 bytes'):
    load(fast)
