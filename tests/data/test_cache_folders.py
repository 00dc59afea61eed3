"""Folders of the cache are whole, whoever prepares or dies; damage is found."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_jax.data import DataOptions, FilesSource, cache_folders, load
from moe_jax.data.cache_folders import check_free, prepared, whole_folder

TOKENS = 'train.documents.tokens'


def write(folder):
  (folder / 'a').write_text('whole')


def test_prepared_once(tmp_path):
  folder = prepared(tmp_path / 'deep' / 'x', write)
  assert (folder / 'a').read_text() == 'whole'
  assert prepared(folder, lambda _: pytest.fail('again')) == folder
  assert os.listdir(folder.parent) == ['x']


def test_a_failed_preparation_leaves_nothing(tmp_path):
  def fail(folder):
    write(folder)
    raise OSError('disk full')

  with pytest.raises(OSError, match='disk full'):
    prepared(tmp_path / 'x', fail)
  assert os.listdir(tmp_path) == []


def test_the_loser_of_a_race_takes_the_winners(tmp_path, monkeypatch):
  # As where the file system has no locks.
  unlocked = contextlib.nullcontext(False)
  monkeypatch.setattr(cache_folders, 'locked', lambda path: unlocked)

  def write_late(folder):
    (folder / 'a').write_text('late')
    prepared(tmp_path / 'x', write)

  folder = prepared(tmp_path / 'x', write_late)
  assert (folder / 'a').read_text() == 'whole'
  assert os.listdir(tmp_path) == ['x']


def process(script, folder):
  """Starts a process that runs a script on `folder`."""
  script = (
    'import os, pathlib, sys\n'
    'from moe_jax.data.cache_folders import prepared, whole_folder\n'
    f'folder = pathlib.Path(sys.argv[1])\n{script}'
  )
  return subprocess.Popen(
    [sys.executable, '-c', script, str(folder)],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip


def test_of_two_who_write_a_folder_of_a_user_the_second_fails(tmp_path):
  script = (
    "print('begins', flush=True)\n"
    'with whole_folder(folder) as new:\n'
    "  (new / 'a').write_text('theirs')\n"
  )
  with whole_folder(tmp_path / 'x') as folder:
    write(folder)
    second = process(script, tmp_path / 'x')
    assert second.stdout.readline() == 'begins\n'
  assert 'x is there already; give a new' in second.communicate(timeout=60)[1]
  assert (tmp_path / 'x' / 'a').read_text() == 'whole'
  assert os.listdir(tmp_path) == ['x']


def test_a_mount_point_is_refused_before_anything_is_written():
  with pytest.raises(ValueError, match='/proc is a mount point'):
    check_free(pathlib.Path('/proc'))


@pytest.mark.slow
def test_others_wait_for_who_prepares_and_what_was_killed_is_made(tmp_path):
  script = (
    'def write(new):\n'
    "  print('writing', flush=True)\n"
    '  sys.stdin.read()\n'
    "  (new / 'a').write_text('theirs')\n"
    '  {end}\n'
    'prepared(folder, write)\n'
  )
  for name, end in (('x', ''), ('killed', 'os.kill(os.getpid(), 9)')):
    first = process(script.format(end=end), tmp_path / name)
    assert first.stdout.readline() == 'writing\n'
    threading.Timer(0.3, first.stdin.close).start()
    folder = prepared(tmp_path / name, write)
    assert (folder / 'a').read_text() == ('whole' if end else 'theirs')
    assert first.wait() == (-signal.SIGKILL if end else 0)
  assert {*os.listdir(tmp_path)} == {'x', 'killed'}


@pytest.fixture
def cached(tmp_path):
  """Options whose tokens are in a cache, and the folder of the tokens."""
  (tmp_path / 'a.txt').write_text('to be or not to be ' * 20)
  options = DataOptions(
    source=FilesSource(f'{tmp_path}/a.txt'), cache_dir=f'{tmp_path}/cache'
  )
  load(options)
  (tokens,) = (tmp_path / 'cache' / 'tokens').iterdir()
  return options, tokens


def test_a_bit_flip_anywhere_in_the_cache_is_found(cached):
  options, tokens = cached
  count = 0
  for path in sorted(tokens.iterdir()):
    good = path.read_bytes()
    assert good
    for index in range(0, len(good), 53):
      changed = bytearray(good)
      changed[index] ^= 1 << (index % 8)
      path.write_bytes(changed)
      with pytest.raises(ValueError, match=f'{tokens} is damaged'):
        load(options)
      count += 1
    path.write_bytes(good)
  assert count > 30
  load(options)  # all is as it was


@pytest.mark.parametrize(
  ('name', 'content', 'phrase'),
  [
    ('files.json', None, 'files.json is missing'),
    ('files.json', '[]\n', 'not as it was'),
    ('about.json', '{}', 'about.json has 2 bytes'),
  ],
)
def test_a_damaged_cache_is_named_and_made_anew(name, content, phrase, cached):
  options, tokens = cached
  (tokens / name).unlink()
  if content is not None:
    (tokens / name).write_text(content)
  with pytest.raises(ValueError, match='delete the folder') as error:
    load(options)
  assert phrase in str(error.value)
  shutil.rmtree(tokens)
  load(options)  # as the message advises


def test_digests_of_large_files_can_be_left_out(cached, monkeypatch):
  options, tokens = cached
  fast = dataclasses.replace(options, cache_digests=False)
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


def test_digests_are_remembered_while_files_stay_as_they_are(
  tmp_path, monkeypatch
):
  path, memory = tmp_path / 'a.txt', tmp_path / 'deep' / 'memory.json'
  path.write_text('abc')

  def is_right():
    content = path.read_bytes()
    expected = {path: hashlib.sha256(content).hexdigest()}
    return cache_folders.sha256s([path], memory) == expected

  # A file that was just written is not trusted; one of a while ago is.
  assert is_right() and not memory.exists()
  now = time.time_ns
  monkeypatch.setattr(cache_folders.time, 'time_ns', lambda: now() + 10**10)
  assert is_right() and memory.exists()
  with monkeypatch.context() as reading:
    reading.setattr(hashlib, 'file_digest', lambda *_: pytest.fail('read'))
    assert is_right()
    memory.write_text('{"a": 3}')
    with pytest.raises(pytest.fail.Exception):
      is_right()
  assert is_right()
  # A change is noticed even with the old size and time.
  old_stat = path.stat()
  path.write_text('xyz')
  os.utime(path, ns=(old_stat.st_atime_ns, old_stat.st_mtime_ns))
  assert is_right()
