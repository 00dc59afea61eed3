"""One job owns a folder; a dead owner never blocks the next."""

import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_jax.runs import ownership
from moe_jax.runs.ownership import (
  BEAT,
  OWNER,
  OwnedError,
  Owner,
  Ownership,
  owned,
)
from moe_jax.runs.storage_errors import storage_path

ROOT = pathlib.Path(__file__).resolve().parents[2]
PERIOD = 0.05


def write_owner(folder, **fields):
  """Writes the file of another owner, as one that was killed leaves it."""
  values = Owner.of_this_process()._asdict() | {'id': 'other'} | fields
  (folder / OWNER).write_text(json.dumps(values))
  return values


def take(folder, message=print):
  return Ownership([storage_path(folder)], message, period=PERIOD)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_it_is_owned_while_it_is_used_and_free_afterwards(tmp_path):
  folder = tmp_path / 'a' / 'run'
  with owned([folder]) as claim:
    claim.confirm()
    assert OWNER in names(folder)
    with pytest.raises(
      OwnedError, match=rf'run is in use by process {os.getpid()} on .* since '
    ):
      take(folder)
    claim.confirm()
  # A job that wrote nothing leaves no folder.
  assert names(tmp_path) == []
  with pytest.raises(RuntimeError), owned([tmp_path]):
    (tmp_path / 'kept').touch()
    raise RuntimeError
  assert names(tmp_path) == ['kept']


def test_several_folders_are_owned_or_none(tmp_path):
  a, b = tmp_path / 'a', tmp_path / 'b'
  with owned([b]):
    with pytest.raises(OwnedError, match='b is in use'), owned([a, b]):
      pass
    assert not a.exists()
  # Two names of one folder are no two owners.
  with owned([a, tmp_path / 'b' / '..' / 'a']):
    pass


@pytest.mark.parametrize(
  'fields',
  [
    {'pid': 4_000_000},
    {'started': '1'},  # the number was given to another process
    {'pid': 2**62},
  ],
)
def test_an_owner_of_this_machine_is_dead_at_once(tmp_path, fields):
  write_owner(tmp_path, **fields)
  lines = []
  take(tmp_path, lines.append).release()
  assert not lines and names(tmp_path) == []


def test_an_owner_that_is_gone_is_dead_at_once_where_there_is_no_proc(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(ownership, '_PROC', tmp_path / 'no')
  write_owner(tmp_path, pid=4_000_000)
  lines = []
  take(tmp_path, lines.append).release()
  assert not lines
  # A process of that number may be the owner, or another.
  write_owner(tmp_path)
  take(tmp_path, lines.append).release()
  assert len(lines) == 1
  assert Owner.of_this_process().alive is None


def test_a_process_that_ended_and_was_not_waited_for_is_dead():
  child = subprocess.Popen([sys.executable, '-c', ''])
  while ownership.process_start(child.pid):  # a zombie until `wait`
    time.sleep(0.01)
  assert ownership.process_start(child.pid) == ''
  child.wait()


@pytest.mark.parametrize(
  'text',
  ['', '{', '[]', '{"id": 1}', '[' * 5000, '\0', '{"pid": "x"}', '9' * 9000],
)
def test_a_damaged_file_blocks_nobody(tmp_path, text):
  (tmp_path / OWNER).write_text(text)
  take(tmp_path).release()
  values = write_owner(tmp_path)
  for name in ('pid', 'id', 'host'):
    (tmp_path / OWNER).write_text(json.dumps(values | {name: None}))
    take(tmp_path).release()


def test_an_owner_elsewhere_is_waited_for_and_announced_in_one_line(tmp_path):
  write_owner(tmp_path, host='elsewhere', pid=7)
  lines, start = [], time.monotonic()
  claim = take(tmp_path, lines.append)
  assert time.monotonic() - start >= 3 * PERIOD
  (line,) = lines
  assert str(tmp_path) in line and 'process 7 on elsewhere' in line
  claim.confirm()
  claim.release()


@pytest.mark.parametrize('changes', [BEAT, OWNER])
def test_an_owner_elsewhere_that_lives_is_not_taken_over(tmp_path, changes):
  write_owner(tmp_path, host='elsewhere')

  def renew(line):
    if changes == BEAT:
      (tmp_path / BEAT).write_text('other 2')
    else:
      write_owner(tmp_path, host='elsewhere', id='third')

  with pytest.raises(OwnedError, match='on elsewhere'):
    take(tmp_path, renew)
  assert json.loads((tmp_path / OWNER).read_text())['host'] == 'elsewhere'


def test_an_owner_that_was_replaced_stops(tmp_path):
  claim = take(tmp_path)
  write_owner(tmp_path, host='elsewhere', pid=7)
  with pytest.raises(OwnedError, match='now belongs to process 7 on elsewh'):
    claim.confirm()
  claim.release()  # and leaves the file of the new owner
  assert OWNER in names(tmp_path)
  claim = take(tmp_path)
  (tmp_path / OWNER).unlink()
  with pytest.raises(OwnedError, match=r'nobody: its owner\.json is gone'):
    claim.confirm()
  claim.release()


def test_it_beats(tmp_path):
  claim, beats = take(tmp_path), set()
  deadline = time.monotonic() + 20
  while len(beats) < 3:
    beats.add(ownership.beat(storage_path(tmp_path)))
    assert time.monotonic() < deadline
    time.sleep(PERIOD / 5)
  claim.release()
  assert names(tmp_path) == []


def no_locks(*args):
  raise OSError('this file system has no locks')


@pytest.mark.parametrize('turns', [True, False])
def test_of_two_who_start_at_once_one_wins(tmp_path, monkeypatch, turns):
  """Without locks the last of those who wrote wins, once all have written."""
  if not turns:
    monkeypatch.setattr(ownership.fcntl, 'flock', no_locks)
    monkeypatch.setattr(ownership, '_SETTLE_SECONDS', 0.3)
  write_owner(tmp_path, pid=4_000_000)
  gate = threading.Barrier(8)

  def start(_):
    gate.wait()
    try:
      return take(tmp_path)
    except OwnedError:
      return None

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    winners = [claim for claim in pool.map(start, range(8)) if claim]
  assert len(winners) == 1
  winners[0].confirm()
  winners[0].release()
  assert names(tmp_path) == []


def child(folder, start_time):
  time.sleep(max(0.0, start_time - time.time()))
  try:
    with owned([folder]) as claim:
      print('won', flush=True)
      sys.stdin.read()
      claim.confirm()
  except OwnedError as error:
    print(error)


@pytest.mark.slow
def test_processes_that_start_at_once_and_are_killed(tmp_path):
  for _ in range(2):  # the second time after owners that were killed
    start_time = time.time() + 6
    module = 'tests.runs.test_ownership'
    code = f'import {module} as m; m.child({str(tmp_path)!r}, {start_time})'
    children = [
      subprocess.Popen(
        [sys.executable, '-c', code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
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
  take(tmp_path).release()
  assert time.monotonic() - began < 1


def test_folders_that_cannot_be_written_are_said(tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  for folder, reason in [
    (tmp_path / 'file', 'File exists'),
    (tmp_path / 'file' / 'run', 'Not a directory'),
    ('gs://bucket/run', 'gcsfs'),
    ('none://bucket/run', 'no file system has URLs'),
    (tmp_path / ('long' * 99), 'too long'),
    ('/proc/run', 'No such file'),
  ]:
    with pytest.raises(ValueError, match=reason) as error, owned([folder]):
      pass
    assert str(folder) in str(error.value)
  assert names(tmp_path) == ['file']
