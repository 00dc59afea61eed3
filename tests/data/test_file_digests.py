"""Digests of files are remembered while the files stay as they are."""

import hashlib
import os
import time

import pytest

from moe_jax.data import cache_folders


@pytest.fixture
def path(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('abc')
  return path


def digest_of(path, memory):
  return cache_folders.sha256s([path], memory)[path]


def age_files(monkeypatch):
  """Lets files look as if they had been written a while ago."""
  now = time.time_ns
  monkeypatch.setattr(cache_folders.time, 'time_ns', lambda: now() + 10**10)


def test_a_file_at_rest_is_read_once(path, tmp_path, monkeypatch):
  memory = tmp_path / 'deep' / 'memory.json'
  digest = hashlib.sha256(b'abc').hexdigest()
  assert digest_of(path, memory) == digest
  age_files(monkeypatch)
  assert digest_of(path, memory) == digest
  with monkeypatch.context() as reading:
    reading.setattr(hashlib, 'file_digest', lambda *_: pytest.fail('read'))
    assert digest_of(path, memory) == digest
    memory.write_text('{"a": 3}')
    with pytest.raises(pytest.fail.Exception):
      digest_of(path, memory)
  assert digest_of(path, memory) == digest


def test_a_change_is_noticed_even_with_the_old_size_and_time(
  path, tmp_path, monkeypatch
):
  memory = tmp_path / 'memory.json'
  age_files(monkeypatch)
  digest_of(path, memory)
  old_stat = path.stat()
  path.write_text('xyz')
  os.utime(path, ns=(old_stat.st_atime_ns, old_stat.st_mtime_ns))
  assert digest_of(path, memory) == hashlib.sha256(b'xyz').hexdigest()


def test_a_file_just_written_is_not_trusted(path, tmp_path):
  memory = tmp_path / 'memory.json'
  digest_of(path, memory)
  assert not memory.exists()
