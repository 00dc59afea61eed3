"""Lines of JSON between processes, over TCP.

Not here: what is said (`watchdog.py`).
"""

import contextlib
import json
import select
import socket
import time
from typing import Any

TICK_SECONDS = 0.5
# In which a collective's failure is explained by the death that caused it, a
# failure's word arrives, and the others end.
MOMENT_SECONDS = 5.0


class Line:
  """JSON values over a socket, one a line; nothing is unpickled."""

  def __init__(self, connection: socket.socket):
    connection.settimeout(MOMENT_SECONDS)
    self.socket = connection
    self._unread = b''

  def send(self, message: dict[str, Any]) -> None:
    """Sends it, unless too much that was sent is not yet read there.

    Of a connection that is gone, reading tells.
    """
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
      writable = select.poll()
      writable.register(self.socket, select.POLLOUT)
      if writable.poll(0):
        self.socket.sendall(json.dumps(message).encode() + b'\n')

  def receive(self) -> list[dict[str, Any]] | None:
    """What came, once there is something to read; None: it is closed."""
    try:
      data = self.socket.recv(2**16)
    except OSError:
      return None
    *lines, self._unread = (self._unread + data).split(b'\n')
    try:
      messages = [json.loads(line) for line in lines] if data else None
    except (ValueError, RecursionError):  # a stranger speaks something else
      return None
    if messages and not all(isinstance(m, dict) for m in messages):
      return None
    return messages


def addresses() -> list[str]:
  """Names of this machine, one of which the others should reach it by."""
  names = [socket.getfqdn(), socket.gethostname()]
  probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
  with probe, contextlib.suppress(OSError):
    # No packet is sent: the kernel says from where one would be.
    probe.connect(('192.0.2.1', 9))
    names.insert(0, probe.getsockname()[0])
  return list(dict.fromkeys([*names, '127.0.0.1']))


def reach(
  hosts: list[str], port: int, hello: dict[str, Any], seconds: float
) -> Line:
  """The line to process 0, which answers with the token that both know.

  Raises:
    ValueError: It is reached by none of its names.
  """
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    for host in hosts:
      with contextlib.suppress(OSError):
        address = host, port
        line = Line(socket.create_connection(address, MOMENT_SECONDS))
        line.send(hello)
        answer = line.receive()
        if answer and answer[0].get('token') == hello['token']:
          return line
        line.socket.close()  # of another machine by that name
    time.sleep(TICK_SECONDS)
  raise ValueError(
    f'process 0 is reached at none of {hosts}, port {port}; ports between the '
    'machines must be open'
  )
