"""Messages between processes: lines of JSON over TCP."""

import contextlib
import json
import select
import socket
import time
from typing import Any

from moe_jax.errors import InputError

TICK_SECONDS = 0.5
# Seconds within which a process that ended is noticed, a message arrives, and a
# process that was told to end has ended.
MOMENT_SECONDS = 5.0


class Line:
  """A connection for JSON objects, one a line; nothing is unpickled."""

  def __init__(self, connection: socket.socket):
    connection.settimeout(MOMENT_SECONDS)
    self.socket = connection
    self._unread = b''

  def send(self, message: dict[str, Any]) -> None:
    """Sends a message, unless the other end has too much left to read.

    Nothing is raised for a lost connection; `receive` reports that.
    """
    with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
      writable = select.poll()
      writable.register(self.socket, select.POLLOUT)
      if writable.poll(0):
        self.socket.sendall(json.dumps(message).encode() + b'\n')

  def receive(self) -> list[dict[str, Any]] | None:
    """Waits for messages and returns them; None if the connection is lost."""
    try:
      received = self.socket.recv(2**16)
    except OSError:
      return None
    *lines, self._unread = (self._unread + received).split(b'\n')
    try:
      messages = [json.loads(line) for line in lines] if received else None
    except (ValueError, RecursionError):  # some other program has connected
      return None
    if messages and not all(isinstance(m, dict) for m in messages):
      return None
    return messages


def addresses() -> list[str]:
  """Addresses and names of this machine that other machines can try."""
  names = [socket.getfqdn(), socket.gethostname()]
  probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
  with probe, contextlib.suppress(OSError):
    # No packet is sent; the kernel gives the address that one would come from.
    probe.connect(('192.0.2.1', 9))
    names.insert(0, probe.getsockname()[0])
  return list(dict.fromkeys([*names, '127.0.0.1']))


def reach(
  hosts: list[str], port: int, hello: dict[str, Any], seconds: float
) -> Line:
  """Connects to process 0, which has to answer with the token.

  Args:
    hosts: Addresses and names of process 0, tried in turn.
    port: The port on which it listens.
    hello: The first message, with the key 'token'.
    seconds: Time after which to give up.

  Raises:
    ValueError: Process 0 is reached at none of the addresses.
  """
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    for host in hosts:
      with contextlib.suppress(OSError):
        address = host, port
        line = Line(socket.create_connection(address, MOMENT_SECONDS))
        line.send(hello)
        answer = line.receive()
        if answer and answer[0].get('token') == hello['token']:
          return line
        line.socket.close()  # another machine has that name or address
    time.sleep(TICK_SECONDS)
  raise InputError(
    f'process 0 is reached at none of {hosts}, port {port}; ports between the '
    'machines must be open'
  )
