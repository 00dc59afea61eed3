"""One job owns a folder; a dead owner never blocks the next."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import filelock
import pytest

from moe_jax.runs.ownership import LOCK, OWNER, OwnedError, holder, owned
from moe_jax.runs.storage_errors import storage_path
from tests import programs


def write_owner(folder, **fields):
  """Writes the file of another owner, as one that was killed leaves it."""
  values = dict(id='other', host=os.uname().nodename, pid=7, since='Monday')
  (folder / OWNER).write_text(json.dumps(values | fields))
  return values


@pytest.fixture
def no_locks(monkeypatch):
  """Stands for a file system that has no locks."""

  def fail(*args):
    raise OSError('no locks here')

  monkeypatch.setattr(filelock.FileLock, '_acquire', fail)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_it_is_owned_while_it_is_used_and_free_afterwards(tmp_path, capsys):
  folder = tmp_path / 'a' / 'run'
  assert holder(storage_path(folder)) is None
  with owned([folder]) as confirm:
    confirm()
    assert names(folder) == [OWNER, LOCK]
    with (
      pytest.raises(
        OwnedError, match=rf'run is in use by process {os.getpid()} on .* since'
      ),
      owned([folder]),
    ):
      pass
    assert holder(storage_path(folder)).pid == str(os.getpid())
    confirm()
  # A job that wrote nothing leaves no folder.
  assert names(tmp_path) == []
  with pytest.raises(RuntimeError), owned([tmp_path]):
    (tmp_path / 'kept').touch()
    raise RuntimeError
  assert names(tmp_path) == ['kept']
  assert not capsys.readouterr().err


def test_several_folders_are_owned_or_none(tmp_path):
  a, b = tmp_path / 'a', tmp_path / 'b'
  with owned([b]):
    with pytest.raises(OwnedError, match='b is in use'), owned([a, b]):
      pass
    assert not a.exists()
  # Two names of one folder are no two owners.
  with owned([a, tmp_path / 'b' / '..' / 'a']):
    pass


def test_what_a_killed_owner_left_holds_nobody_up(tmp_path, capsys):
  write_owner(tmp_path)
  (tmp_path / LOCK).touch()
  assert holder(storage_path(tmp_path)) is None
  with owned([tmp_path]) as confirm:
    confirm()
  assert not capsys.readouterr().err
  # The lock may be one within a machine, so the other may still run.
  write_owner(tmp_path, host='elsewhere')
  with owned([tmp_path]):
    pass
  (line,) = capsys.readouterr().err.splitlines()
  assert f'{tmp_path} was of process 7 on elsewhere since Monday' in line
  assert names(tmp_path) == []


@pytest.mark.parametrize(
  'text', ['{', '[]', '{"id": 1}', '[' * 5000, '{"pid": "x"}', '9' * 9000]
)
def test_a_damaged_file_blocks_nobody(tmp_path, text):
  (tmp_path / OWNER).write_text(text)
  with owned([tmp_path]) as confirm:
    confirm()


def test_an_owner_that_was_replaced_stops(tmp_path):
  with owned([tmp_path]) as confirm:
    write_owner(tmp_path, host='elsewhere')
    with pytest.raises(OwnedError, match='now belongs to process 7 on elsewh'):
      confirm()
  assert OWNER in names(tmp_path)  # it is the new owner's
  with owned([tmp_path]) as confirm:
    (tmp_path / OWNER).unlink()
    with pytest.raises(OwnedError, match=r'nobody: its owner\.json is gone'):
      confirm()


def test_without_locks_the_last_is_warned_and_the_first_ends(
  tmp_path, no_locks, capsys
):
  with owned([tmp_path]) as first:
    assert not capsys.readouterr().err
    with owned([tmp_path]) as second:
      second()
      line = capsys.readouterr().err
      assert f'{tmp_path} was of process {os.getpid()} on ' in line
      assert 'that process ends before its next save if it still runs' in line
      with pytest.raises(OwnedError, match='now belongs to process'):
        first()
      second()
  assert names(tmp_path) == []


@pytest.mark.parametrize('locks', [True, False])
def test_of_two_who_start_at_once_one_wins(tmp_path, request, locks):
  """Without locks the last of those who wrote wins, once all have written."""
  if not locks:
    request.getfixturevalue('no_locks')
  write_owner(tmp_path)
  gates = [threading.Barrier(8), threading.Barrier(8), threading.Barrier(8)]

  def start(_):
    gates[0].wait()
    with contextlib.ExitStack() as stack:
      confirm = None
      with contextlib.suppress(OwnedError):
        confirm = stack.enter_context(owned([tmp_path]))
      gates[1].wait()
      won = False
      if confirm is not None:
        with contextlib.suppress(OwnedError):
          confirm()
          won = True
      gates[2].wait()
      return won

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert sum(pool.map(start, range(8))) == 1
  assert names(tmp_path) == []


def child(folder, start_time):
  time.sleep(max(0.0, start_time - time.time()))
  try:
    with owned([folder]) as confirm:
      print('won', flush=True)
      sys.stdin.read()
      confirm()
  except OwnedError as error:
    print(error)


@pytest.mark.slow
def test_processes_that_start_at_once_and_are_killed(tmp_path):
  for _ in range(2):  # the second time after owners that were killed
    start_time = time.time() + 6
    module = 'tests.runs.test_ownership'
    code = f'import {module} as m; m.child({str(tmp_path)!r}, {start_time})'
    children = [
      programs.started('-c', code, stdin=subprocess.PIPE, stderr=None)
      for _ in range(2)
    ]
    answers = [process.stdout.readline() for process in children]
    assert sorted('won' in line for line in answers) == [False, True], answers
    for process in children:
      process.send_signal(signal.SIGKILL)
      process.wait()
      process.stdout.close()
      process.stdin.close()
  began = time.monotonic()
  with owned([tmp_path]):
    assert time.monotonic() - began < 1


def test_folders_that_cannot_be_written_are_said(tmp_path):
  (tmp_path / 'file').touch()
  for folder, reason in [
    (tmp_path / 'file' / 'run', 'Not a directory'),
    ('gs://bucket/run', 'gcsfs'),
    ('none://bucket/run', 'no file system has URLs'),
    ('/proc/run', 'No such file'),
  ]:
    with pytest.raises(ValueError, match=reason) as error, owned([folder]):
      pass
    assert str(folder) in str(error.value)
  assert names(tmp_path) == ['file']
