"""Messages between processes, and which connections are accepted."""

import json
import socket
import threading
import time

import pytest

from moe_jax.runs import watchdog
from moe_jax.runs.watchdog import Line, reach


@pytest.fixture
def pair():
  one, other = socket.socketpair()
  yield Line(one), Line(other)
  one.close()
  other.close()


def test_messages_arrive_whole_however_they_are_cut(pair):
  line, other = pair
  text = json.dumps({'a': 1}) + '\n' + json.dumps({'b': 2}) + '\n'
  line.socket.sendall(text[:4].encode())
  assert other.receive() == []
  line.socket.sendall(text[4:14].encode())
  assert other.receive() == [{'a': 1}]
  line.socket.sendall(text[14:].encode())
  assert other.receive() == [{'b': 2}]


@pytest.mark.parametrize(
  'message', [b'GET / HTTP/1.1\r\n', b'1\n', b'\xff\n', b'[' * 9999 + b'\n']
)
def test_a_closed_line_is_none_and_a_stranger_too(message, pair):
  line, other = pair
  line.socket.sendall(message)
  assert other.receive() is None
  line.socket.close()
  assert other.receive() is None
  other.send({'nobody': 'listens'})  # raises no error


def test_who_does_not_read_holds_nobody_up(pair):
  line, other = pair
  began = time.monotonic()
  for number in range(5000):
    line.send({'number': number, 'text': 'x' * 1000})
    assert time.monotonic() - began < 3
  # Messages that are left out are left out whole.
  first = other.receive()[0]
  assert first['number'] == 0
  line.socket.close()
  while (messages := other.receive()) is not None:
    assert all(len(message['text']) == 1000 for message in messages)


def answering(server, token):
  def serve():
    while True:
      try:
        connection = server.accept()[0]
      except OSError:
        return
      line = Line(connection)
      if line.receive():
        line.send({'token': token})

  threading.Thread(target=serve, daemon=True).start()


def test_process_0_is_who_knows_the_token(monkeypatch):
  monkeypatch.setattr(watchdog, 'TICK_SECONDS', 0.05)
  with socket.create_server(('127.0.0.1', 0)) as server:
    answering(server, 'secret')
    port = server.getsockname()[1]
    hosts = ['no.such.host.invalid', '127.0.0.1']
    line = reach(hosts, port, {'token': 'secret'}, 5.0)
    line.socket.close()
    with pytest.raises(ValueError, match=f'none of .*127.0.0.1.*port {port}'):
      reach(hosts, port, {'token': 'other'}, 0.2)
