"""Caches of tokens that are damaged are named, and made anew on request."""

import os
import pathlib
import shutil

import pytest

from moe_jax.data import (
  DataOptions,
  FilesSource,
  cache_folders,
  load,
)

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
