"""Ends all processes of a run when one of them is lost, and says which.

A process that waits for another in a collective operation waits for ever. So
each process has a thread that reports its current stage to process 0 over TCP
and is told when to end. A process is lost if it died (its connection closes),
failed (it reports the error), does not answer, or has not begun a new stage for
so long that all others wait for it.

JAX's own heartbeats stay on. They notice a death later, and notice neither an
error nor an endless loop.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.distributed import Timeouts
from moe_jax.runs.lines import (
  MOMENT_SECONDS,
  TICK_SECONDS,
  Line,
  addresses,
  reach,
)
from moe_jax.runs.peers import Peers

# Most seconds that an ending process waits for a pending save.
_SAVE_SECONDS = 10.0
_HELLO_BYTES = 1024
# Seconds between two rounds of process 0, so that it reads from many processes
# in one round.
_PAUSE_SECONDS = 0.05


class Alone:
  """The counterpart of `Watchdog` for a single process; it does nothing."""

  before_end: Callable[[float], None] | None = None

  def mark(self, stage: str) -> None:
    """Does nothing; see `Watchdog.mark`."""


@contextlib.contextmanager
def watching(timeouts: Timeouts) -> Iterator['Alone | Watchdog']:
  """Watches the processes while the body runs; every process enters this.

  An error in the body of one process ends the others with its message. Without
  an error, each waits at the end of the body for all others.
  """
  if jax.process_count() == 1:
    yield Alone()
    return
  watchdog = Watchdog(timeouts)
  try:
    yield watchdog
  except BaseException as error:
    if isinstance(error, jax.errors.JaxRuntimeError):
      # Probably another process died; if so, the thread ends this one now.
      time.sleep(MOMENT_SECONDS)
    watchdog.fail(f'{type(error).__name__}: {error}')
    raise
  watchdog.finish()


class Watchdog:
  """The watchdog of one process; see `watching`.

  Attributes:
    before_end: Function that is called before this process is ended because of
      another; it gets the number of seconds after which it must have returned.
  """

  before_end: Callable[[float], None] | None = None

  def __init__(self, timeouts: Timeouts):
    self._index, self._size = jax.process_index(), jax.process_count()
    self._silence = timeouts.heartbeat_timeout_seconds
    self._peers = Peers(self._size, timeouts)
    self._this_peer = self._peers[self._index]
    self._failure = ''  # error of this process, which then ends by itself
    self._over = threading.Event()
    self._connect(float(timeouts.initialization_timeout_seconds))
    self._thread = threading.Thread(
      target=self._watch, name='watchdog', daemon=True
    )
    self._thread.start()

  def mark(self, stage: str) -> None:
    """Reports that this process begins a stage, such as `step 3`.

    All processes have the same stages in the same order, so the process with
    the fewest is behind.
    """
    self._this_peer.stage = stage
    self._this_peer.num_stages += 1

  def fail(self, text: str) -> None:
    """Makes the other processes end, with this text as the reason."""
    self._failure = f'process {self._index} failed: {text}'
    self._over.wait(2 * MOMENT_SECONDS)

  def finish(self) -> None:
    """Waits until all processes have called this."""
    self.mark('the end')
    self._this_peer.is_done = True
    self._over.wait()

  def _connect(self, seconds: float) -> None:
    """Connects this process to process 0; process 0 begins to listen."""
    if self._index == 0:
      dual = socket.has_dualstack_ipv6()
      family = socket.AF_INET6 if dual else socket.AF_INET
      self._server = socket.create_server(
        ('', 0), family=family, dualstack_ipv6=dual, backlog=self._size
      )
      self._token = secrets.token_hex(16)
      port = self._server.getsockname()[1]
      hello = [self._token, port, *addresses()]
    packet = np.zeros(_HELLO_BYTES, np.uint8)
    if self._index == 0:
      text = json.dumps(hello).encode()
      packet[: len(text)] = np.frombuffer(text, np.uint8)
    packet = multihost_utils.broadcast_one_to_all(packet)
    token, port, *hosts = json.loads(bytes(packet).rstrip(b'\0'))
    if self._index:
      self._hub = reach(
        hosts, port, {'process': self._index, 'token': token}, seconds
      )
    self._lines: dict[int, Line] = {}
    self._strangers: list[Line] = []

  def _watch(self) -> None:
    """Runs on the thread; if that fails, the process ends, too."""
    try:
      if self._index == 0:
        self._lead()
      else:
        self._follow()
    except Exception as error:
      self._end(f'its watchdog failed: {type(error).__name__}: {error}')

  # Process 0.

  def _lead(self) -> None:
    next_send = time.monotonic()
    deadline = next_send + MOMENT_SECONDS  # one who connects is told, too
    while not self._over.is_set():
      lines = [*self._lines.values(), *self._strangers]
      ready = wait(
        [self._server, *(line.socket for line in lines)],
        max(0.0, next_send - time.monotonic()),
      )
      if self._server in ready:
        with contextlib.suppress(ConnectionError):  # it was closed at once
          self._strangers.append(Line(self._server.accept()[0]))
      for line in self._strangers[:]:
        if line.socket in ready:
          self._greet(line)
      for index, line in list(self._lines.items()):
        if line.socket in ready:
          self._listen(index, line)
      self._this_peer.last_heard = time.monotonic()
      if time.monotonic() >= next_send:
        next_send = time.monotonic() + TICK_SECONDS
        for line in self._lines.values():
          line.send({})
      joined = len(self._lines) + 1 == self._size or time.monotonic() > deadline
      if joined and (reason := self._failure or self._peers.end_reason()):
        self._end_all(reason)
      elif self._peers.all_done:
        self._tell_all({'over': True})
      time.sleep(_PAUSE_SECONDS)
    self._server.close()

  def _greet(self, line: 'Line') -> None:
    """Accepts a connection if it knows the token, as anybody can connect."""
    messages = line.receive()
    if messages == []:
      return
    self._strangers.remove(line)
    hello = messages[0] if messages else {}
    token = str(hello.get('token')).encode(errors='replace')
    if secrets.compare_digest(token, self._token.encode()):
      line.send({'token': self._token})
      self._lines[int(hello['process'])] = line
      for message in messages[1:] if messages else ():
        self._hear(int(hello['process']), message)
    else:
      line.socket.close()

  def _listen(self, index: int, line: 'Line') -> None:
    messages = line.receive()
    if messages is None:
      if not self._peers[index].is_done:
        stage = self._peers[index].stage
        self._end_all(f'process {index} died; it had got to {stage}')
      del self._lines[index]
      return
    for message in messages:
      self._hear(index, message)

  def _hear(self, index: int, message: dict[str, Any]) -> None:
    peer = self._peers[index]
    peer.last_heard = time.monotonic()
    peer.num_stages, peer.stage = message['count'], message['where']
    peer.is_done = message['done']
    if message['failed']:
      self._end_all(message['failed'])

  def _end_all(self, reason: str) -> None:
    if not self._over.is_set():
      self._tell_all({'end': reason})
      self._end(reason)

  def _tell_all(self, message: dict[str, Any]) -> None:
    for line in self._lines.values():
      line.send(message)
    # Closing a socket with unread data may discard what was sent, so all is
    # read until the other ends are closed.
    deadline = time.monotonic() + MOMENT_SECONDS
    lines: dict[Any, Any] = {w.socket: w for w in self._lines.values()}
    while lines and time.monotonic() < deadline:
      for ready in wait(list(lines), TICK_SECONDS):
        if lines[ready].receive() is None:
          del lines[ready]
    self._over.set()

  # All other processes.

  def _follow(self) -> None:
    last_heard = next_send = time.monotonic()
    while not self._over.is_set():
      if time.monotonic() >= next_send:
        next_send = time.monotonic() + TICK_SECONDS
        self._hub.send(
          {
            'count': self._this_peer.num_stages,
            'where': self._this_peer.stage,
            'done': self._this_peer.is_done,
            'failed': self._failure,
          }
        )
      if wait([self._hub.socket], max(0.0, next_send - time.monotonic())):
        messages = self._hub.receive()
        if messages is None:
          self._end('process 0 died', settle=False)
          return
        last_heard = time.monotonic()
        for message in messages:
          if 'end' in message:
            self._end(message['end'])
            return
          if 'over' in message:
            self._hub.socket.close()
            self._over.set()
            return
      if time.monotonic() - last_heard > self._silence:
        reason = f'process 0 does not answer, for {self._silence:.0f} s'
        self._end(reason, settle=False)

  # All processes.

  def _end(self, reason: str, settle: bool = True) -> None:
    """Ends this process, unless it ends by itself with an error of its own.

    Args:
      reason: Text that is printed.
      settle: Whether a pending save may be completed first, which takes
        process 0.
    """
    self._over.set()
    if self._failure:
      return
    print(
      f'moe_jax: process {self._index} of {self._size} ends: {reason}',
      file=sys.stderr,
      flush=True,
    )
    if self._index:
      self._hub.socket.close()
    if settle and self.before_end is not None:
      # The main thread cannot: it waits in a collective operation.
      with contextlib.suppress(Exception):
        self.before_end(min(_SAVE_SECONDS, self._silence / 4))
    sys.stdout.flush()
    os._exit(1)
