"""Messages between the threads of several processes, and their number."""

import json
import os
import socket
import threading
import time

import jax
import pytest

from moe_jax.devices import Timeouts
from moe_jax.runs import watchdog as watchdog_lib
from moe_jax.runs.watchdog import Line, Watchdog, reach

TICK, SECONDS = 0.1, 1.0
MAX_MESSAGES = SECONDS / TICK + 3
STATUS = {'count': 1, 'where': 'here', 'done': False, 'failed': ''}


@pytest.fixture
def process(monkeypatch):
  """Makes the watchdog of one process; the test plays the others."""
  monkeypatch.setattr(watchdog_lib, 'TICK_SECONDS', TICK)

  def make(index, size, hello=None, **timeouts):
    sent = []

    def broadcast(array):
      sent.append(array)
      return array if hello is None else hello

    monkeypatch.setattr(jax, 'process_index', lambda: index)
    monkeypatch.setattr(jax, 'process_count', lambda: size)
    monkeypatch.setattr(
      watchdog_lib.multihost_utils,
      'broadcast_one_to_all',
      broadcast,
    )
    watchdog = Watchdog(Timeouts(**timeouts))
    token, port, *_ = json.loads(bytes(sent[0]).rstrip(b'\0') or '["", 0]')
    return watchdog, token, port

  return make


def test_strangers_do_not_end_the_watch(process):
  watchdog, _, port = process(0, 1)
  for message in (b'1\n', b'{"token": "\xc3\xa9"}\n', b'{}\n', b'{"a": 1}\n'):
    with socket.create_connection(('127.0.0.1', port), 5.0) as stranger:
      stranger.sendall(message)
      assert stranger.recv(9) == b''
  assert any(thread.name == 'watchdog' for thread in threading.enumerate())
  watchdog.finish()


def test_process_0_answers_once_a_tick(process):
  watchdog, token, port = process(0, 2)
  line = reach(['127.0.0.1'], port, {'process': 1, 'token': token}, 5.0)
  answers, deadline = 0, time.monotonic() + SECONDS
  while time.monotonic() < deadline:
    line.send(STATUS)  # without waiting for an answer
    answers += len(line.receive())
  assert 2 <= answers <= MAX_MESSAGES
  line.send({**STATUS, 'done': True})
  line.socket.shutdown(socket.SHUT_WR)
  watchdog.finish()


def test_others_speak_once_a_tick(process):
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    messages = []

    def answer():
      line = Line(server.accept()[0])
      line.send(line.receive()[0])
      deadline = time.monotonic() + SECONDS
      while time.monotonic() < deadline:
        messages.extend(line.receive())
        line.send({})
      line.send({'over': True})

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    text = f'["secret", {port}, "127.0.0.1"]'.encode()
    watchdog, _, _ = process(1, 2, hello=text)
    watchdog.finish()
    thread.join()
  assert 2 <= len(messages) <= MAX_MESSAGES


def test_a_stall_before_the_first_mark_is_seen(process, monkeypatch, capfd):
  statuses = []
  # The watchdog would end the process of the tests.
  monkeypatch.setattr(os, '_exit', statuses.append)
  _, token, port = process(0, 2, stall_timeout_seconds=1)
  line = reach(['127.0.0.1'], port, {'process': 1, 'token': token}, 5.0)
  answers, deadline = [], time.monotonic() + 20
  while not any(answers) and time.monotonic() < deadline:
    line.send({**STATUS, 'count': 0, 'where': 'the start'})
    answers = line.receive() or []
    time.sleep(TICK / 4)
  line.socket.close()
  reason = (
    'nothing moved for 1 s; no process is behind: all have got to the start'
  )
  assert {'end': reason} in answers
  while not statuses and time.monotonic() < deadline:
    time.sleep(TICK)
  assert statuses == [1]
  assert f'process 0 of 2 ends: {reason}' in capfd.readouterr().err
