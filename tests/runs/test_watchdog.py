"""What the threads of several processes send each other, and how often."""

import socket
import threading
import time

import jax
import pytest

from moe_jax.distributed import Timeouts
from moe_jax.runs import watchdog as watchdog_lib
from moe_jax.runs.lines import Line, reach
from moe_jax.runs.watchdog import Watchdog

TICK, SECONDS = 0.1, 1.0
MOST = SECONDS / TICK + 3
SAYS = {'count': 1, 'where': 'here', 'done': False, 'failed': ''}


@pytest.fixture
def process(monkeypatch):
  """Makes the watchdog of one of so many processes; the test is the others."""
  monkeypatch.setattr(watchdog_lib, 'TICK_SECONDS', TICK)

  def make(index, size, hello=None):
    monkeypatch.setattr(jax, 'process_index', lambda: index)
    monkeypatch.setattr(jax, 'process_count', lambda: size)
    monkeypatch.setattr(
      watchdog_lib.multihost_utils,
      'broadcast_one_to_all',
      lambda sent: sent if hello is None else hello,
    )
    return Watchdog(Timeouts())

  return make


def port_of(watchdog):
  return watchdog._server.getsockname()[1]


def test_strangers_do_not_end_the_watch(process):
  watchdog = process(0, 1)
  for said in (b'1\n', b'{"token": "\xc3\xa9"}\n', b'{}\n', b'{"a": 1}\n'):
    address = '127.0.0.1', port_of(watchdog)
    with socket.create_connection(address, 5.0) as stranger:
      stranger.sendall(said)
      assert stranger.recv(9) == b''
  assert watchdog._thread.is_alive()
  watchdog.finish()


def test_process_0_answers_once_a_tick(process):
  watchdog = process(0, 2)
  hello = {'process': 1, 'token': watchdog._token}
  line = reach(['127.0.0.1'], port_of(watchdog), hello, 5.0)
  answers, until = 0, time.monotonic() + SECONDS
  while time.monotonic() < until:
    line.send(SAYS)  # at once, whatever comes
    answers += len(line.receive())
  assert 2 <= answers <= MOST
  line.send({**SAYS, 'done': True})
  line.socket.shutdown(socket.SHUT_WR)
  watchdog.finish()


def test_others_speak_once_a_tick(process):
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    heard = []

    def answer():
      line = Line(server.accept()[0])
      line.send(line.receive()[0])
      until = time.monotonic() + SECONDS
      while time.monotonic() < until:
        heard.extend(line.receive())
        line.send({})
      line.send({'over': True})

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    text = f'["secret", {port}, "127.0.0.1"]'.encode()
    watchdog = process(1, 2, hello=text)
    watchdog.finish()
    thread.join()
  assert 2 <= len(heard) <= MOST


def test_a_stall_before_the_first_mark_is_seen(process):
  watchdog = process(0, 2)
  try:
    watchdog._over.set()  # the thread itself would end this process
    watchdog._thread.join()
    assert watchdog._lost() is None
    watchdog._moved -= 1000
    assert 'no process is behind: all have got to the start' in (
      watchdog._lost()
    )
  finally:
    watchdog._server.close()
