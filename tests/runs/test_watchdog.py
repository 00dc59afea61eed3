"""One process of several and its watchdog; the test plays the others."""

import json
import os
import subprocess
import sys
import threading
import time

import jax
import pytest

from moe_jax.devices import Timeouts
from moe_jax.runs import watchdog as watchdog_lib
from moe_jax.runs.watchdog import Watchdog, watching

TICK = 0.05


@pytest.fixture
def play(monkeypatch, tmp_path):
  """Starts the watchdog of one of two processes; gives its folder."""
  monkeypatch.setattr(watchdog_lib, 'TICK_SECONDS', TICK)
  monkeypatch.setattr(watchdog_lib, 'MOMENT_SECONDS', 4 * TICK)
  monkeypatch.setattr(watchdog_lib, 'from_first', lambda text: 'token')
  monkeypatch.setattr(jax, 'process_count', lambda: 2)

  def begin(index, **timeouts):
    monkeypatch.setattr(jax, 'process_index', lambda: index)
    watchdog = Watchdog(Timeouts(**timeouts), tmp_path / 'processes')
    thread = threading.Thread(target=watchdog.start)
    thread.start()
    return watchdog, thread

  return begin


@pytest.fixture
def statuses(monkeypatch):
  """The statuses with which the watchdog would end this process."""
  found = []
  monkeypatch.setattr(os, '_exit', found.append)
  return found


def say(folder, index, beat, **values):
  """Writes the file of another process, which is on another machine."""
  folder.mkdir(exist_ok=True)
  path = folder / f'token.{index}'
  path.write_text(json.dumps({'machine': 'other', 'beat': beat, **values}))


def wait_for(condition, seconds=20.0):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(TICK / 5)


def test_a_stall_before_the_first_mark_is_seen(play, statuses, tmp_path, capfd):
  folder, beat, told = tmp_path / 'processes', 1, ''
  _, thread = play(0, stall_timeout_seconds=1)
  wait_for((folder / 'token.0').exists)
  while 'nothing moved' not in told:  # the other lives, and reads why it ends
    say(folder, 1, beat := beat + 1)
    time.sleep(TICK / 2)
    told = (folder / 'token.0').read_text()
  wait_for(lambda: statuses == [1])
  thread.join()
  assert (
    'process 0 of 2 ends: nothing moved for 1 s; all processes got only to the '
    'start'
  ) in capfd.readouterr().err
  assert not folder.exists()


@pytest.mark.parametrize(
  ('index', 'values', 'reason'),
  [
    (0, {'failure': 'process 1 failed: OSError: x'}, 'process 1 failed: OSErr'),
    (0, {}, 'process 1 does not answer, for 1 s; it had got to step 7'),
    (1, {}, 'process 0 does not answer, for 1 s; it had got to step 7'),
    (1, {'failure': 'process 2 died'}, 'process 2 died'),
  ],
)
def test_who_is_lost_is_named(
  play, statuses, tmp_path, capfd, index, values, reason
):
  folder = tmp_path / 'processes'
  _, thread = play(index, heartbeat_timeout_seconds=1)
  wait_for((folder / f'token.{index}').exists)
  say(folder, 1 - index, 1, stage='step 7')
  thread.join()
  (folder / f'token.{1 - index}').write_text('{"half": ')  # says nothing
  if values:
    say(folder, 1 - index, 2, **values)
  wait_for(lambda: statuses == [1])
  assert f'process {index} of 2 ends: {reason}' in capfd.readouterr().err


@pytest.mark.parametrize('index', [0, 1])
def test_a_folder_that_is_not_shared_is_said(
  play, tmp_path, monkeypatch, index
):
  monkeypatch.setattr(watchdog_lib, 'SHARED_SECONDS', 0.1)
  monkeypatch.setattr(jax, 'process_index', lambda: index)
  message = f'process {index} does not see what process {1 - index} writes'
  with pytest.raises(ValueError, match=message), watching(Timeouts(), tmp_path):
    pass
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('index', [0, 1])
def test_a_death_on_this_machine_is_seen_at_once(
  play, statuses, tmp_path, capfd, index
):
  child = subprocess.Popen([sys.executable, '-c', ''])  # a zombie until `wait`
  folder, other = tmp_path / 'processes', 1 - index
  _, thread = play(index)
  own = folder / f'token.{index}'
  wait_for(lambda: own.exists() and own.read_text())
  machine = json.loads(own.read_text())['machine']
  say(folder, other, 1, machine=machine, pid=child.pid, stage='step 7')
  thread.join()
  wait_for(lambda: statuses == [1])
  text = f'process {other} died; it had got to step 7'
  assert text in capfd.readouterr().err
  child.wait()
