"""Folders of the cache are complete, whichever process prepares or dies."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from moe_jax.data import cache_folders
from moe_jax.data.cache_folders import check_free, prepared, whole_folder


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


def test_of_two_who_write_a_folder_of_a_user_the_second_fails(tmp_path):
  script = (
    'import pathlib, sys\n'
    'from moe_jax.data.cache_folders import whole_folder\n'
    "print('begins', flush=True)\n"
    'with whole_folder(pathlib.Path(sys.argv[1])) as folder:\n'
    "  (folder / 'a').write_text('theirs')\n"
  )
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  with whole_folder(tmp_path / 'x') as folder:
    write(folder)
    process = subprocess.Popen(
      [sys.executable, '-c', script, str(tmp_path / 'x')],
      env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
      **pipes,
    )
    assert process.stdout.readline() == 'begins\n'
  assert 'x is there already; give a new' in process.communicate(timeout=60)[1]
  assert (tmp_path / 'x' / 'a').read_text() == 'whole'
  assert os.listdir(tmp_path) == ['x']


def test_a_mount_point_is_refused_before_anything_is_written():
  with pytest.raises(ValueError, match='/proc is a mount point'):
    check_free(pathlib.Path('/proc'))


@pytest.mark.slow
def test_others_wait_for_who_prepares(tmp_path):
  script = (
    'import pathlib, sys, time\n'
    'from moe_jax.data.cache_folders import prepared\n'
    'def write(folder):\n'
    "  print('writing', flush=True)\n"
    '  sys.stdin.read()\n'
    "  (folder / 'a').write_text('theirs')\n"
    'prepared(pathlib.Path(sys.argv[1]), write)\n'
  )
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  process = subprocess.Popen(
    [sys.executable, '-c', script, str(tmp_path / 'x')],
    env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  with process:
    assert process.stdout.readline() == 'writing\n'
    timer = threading.Timer(0.3, process.stdin.close)
    timer.start()
    folder = prepared(tmp_path / 'x', lambda _: pytest.fail('twice'))
  assert (folder / 'a').read_text() == 'theirs'
  assert os.listdir(tmp_path) == ['x']


@pytest.mark.slow
def test_a_killed_preparation_is_made_anew(tmp_path):
  script = (
    'import os, pathlib, sys\n'
    'from moe_jax.data.cache_folders import prepared\n'
    'def write(folder):\n'
    "  (folder / 'a').write_text('half')\n"
    '  os.kill(os.getpid(), 9)\n'
    'prepared(pathlib.Path(sys.argv[1]), write)\n'
  )
  command = [sys.executable, '-c', script, str(tmp_path / 'x')]
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
  process = subprocess.run(command, env=environment)
  assert process.returncode == -signal.SIGKILL
  assert not (tmp_path / 'x').exists()
  folder = prepared(tmp_path / 'x', write)
  assert (folder / 'a').read_text() == 'whole'
