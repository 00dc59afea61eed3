"""Ends all processes of a run when one of them is lost, and says which.

A process that waits for another in a collective operation waits for ever. So
each process has a thread that reports the process' current stage to process 0
over TCP, and that process 0 tells when to end. A process is lost if it died
(its connection closes), failed (it reports the error), does not answer, or has
not begun a new stage for so long that all others wait for it.

JAX's own heartbeats stay on. They notice the death of a process later than this
watchdog, and notice neither an error nor an endless loop.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import select
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

from moe_jax.devices import Timeouts
from moe_jax.errors import InputError

TICK_SECONDS = 0.5
# Seconds within which the end of a process is noticed, a message arrives, and a
# process that was told to end has ended.
MOMENT_SECONDS = 5.0

# The most seconds that an ending process waits for a pending save.
_SAVE_SECONDS = 10.0
_HELLO_BYTES = 1024
# Seconds that process 0 sleeps after each round of reading messages, so that
# one round reads the messages of many processes.
_PAUSE_SECONDS = 0.05


class Line:
  """A connection for JSON objects, each on a line; nothing is unpickled."""

  def __init__(self, connection: socket.socket):
    connection.settimeout(MOMENT_SECONDS)
    self.socket = connection
    self._unread = b''

  def send(self, message: dict[str, Any]) -> None:
    """Sends a message, unless the other end has too much left to read.

    A lost connection raises nothing here; `receive` reports it.
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
    # No packet is sent; the kernel gives the address that a packet would have.
    probe.connect(('192.0.2.1', 9))
    names.insert(0, probe.getsockname()[0])
  return list(dict.fromkeys([*names, '127.0.0.1']))


def reach(
  hosts: list[str], port: int, hello: dict[str, Any], seconds: float
) -> Line:
  """Connects to process 0, which has to answer with the token.

  Args:
    hosts: Addresses and names of process 0, tried in turn.
    port: The port on which process 0 listens.
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
        line.socket.close()  # another program answers at this address
    time.sleep(TICK_SECONDS)
  raise InputError(
    f'process 0 is reached at none of {hosts}, port {port}; ports between the '
    'machines must be open'
  )


@dataclasses.dataclass
class Peer:
  """The state of one process of a run.

  Attributes:
    num_stages: Number of stages that the process has begun.
    stage: Name of the last stage, such as 'step 3'.
    last_heard: Time of the process' last message, in seconds of the monotonic
      clock.
    is_done: Whether the process has reached the end and waits for the others.
  """

  num_stages: int = 0
  stage: str = 'the start'
  last_heard: float = dataclasses.field(default_factory=time.monotonic)
  is_done: bool = False


class Peers:
  """The states of all processes of a run, by the index of the process."""

  def __init__(self, size: int, timeouts: Timeouts):
    """Begins with `size` processes that have just started."""
    self._peers = {i: Peer() for i in range(size)}
    self._silence = timeouts.heartbeat_timeout_seconds
    self._stall = timeouts.stall_timeout_seconds
    self._last_move = time.monotonic()
    self._total_stages = 0

  def __getitem__(self, index: int) -> Peer:
    return self._peers[index]

  @property
  def all_done(self) -> bool:
    """Whether every process has reached the end."""
    return all(peer.is_done for peer in self._peers.values())

  def end_reason(self) -> str | None:
    """The reason for which all processes have to end; None if there is none.

    Either a process is silent, or no process has begun a new stage for too
    long.
    """
    now = time.monotonic()
    awake = {i: p for i, p in self._peers.items() if not p.is_done}
    for index, peer in awake.items():
      if now - peer.last_heard > self._silence:
        return (
          f'process {index} does not answer, for {now - peer.last_heard:.0f} s'
          f'; it had got to {peer.stage}'
        )
    total_stages = sum(peer.num_stages for peer in self._peers.values())
    if total_stages != self._total_stages:
      self._total_stages, self._last_move = total_stages, now
    if not self._stall or now - self._last_move <= self._stall or not awake:
      return None
    return f'nothing moved for {self._stall} s; {self._behind(awake)}'

  def _behind(self, awake: dict[int, Peer]) -> str:
    """Text that names the processes that are behind, and their last stage."""
    least = min(peer.num_stages for peer in awake.values())
    behind = [i for i, peer in awake.items() if peer.num_stages == least]
    if len(behind) == len(self._peers):
      who = 'no process is behind: all have'
    elif len(behind) > 1:
      who = f'processes {", ".join(map(str, behind))} are behind: they have'
    else:
      who = f'process {behind[0]} is stuck: it has'
    return f'{who} got to {awake[behind[0]].stage}'


class Alone:
  """The counterpart of `Watchdog` for a single process; it does nothing."""

  before_end: Callable[[float], None] | None = None

  def mark(self, stage: str) -> None:
    """Does nothing; see `Watchdog.mark`."""


@contextlib.contextmanager
def watching(timeouts: Timeouts) -> Iterator['Alone | Watchdog']:
  """Watches the processes while the body runs; every process enters this.

  An error in the body of one process ends all others, which print the error.
  Without an error, each process waits at the end of the body for all others.
  """
  if jax.process_count() == 1:
    yield Alone()
    return
  watchdog = Watchdog(timeouts)
  try:
    yield watchdog
  except BaseException as error:
    if isinstance(error, jax.errors.JaxRuntimeError):
      # Probably another process died; if so, the watchdog's thread ends this
      # process now.
      time.sleep(MOMENT_SECONDS)
    watchdog.fail(f'{type(error).__name__}: {error}')
    raise
  watchdog.finish()


class Watchdog:
  """The watchdog of one process; see `watching`.

  Attributes:
    before_end: Function that is called before this process ends because of
      another process; its argument is the seconds within which it must return.
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

    All processes have the same stages in the same order, so the process that
    has begun the fewest stages is behind.
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
    """Connects this process to process 0; in process 0, begins to listen."""
    packet = np.zeros(_HELLO_BYTES, np.uint8)
    if self._index == 0:
      dual = socket.has_dualstack_ipv6()
      family = socket.AF_INET6 if dual else socket.AF_INET
      self._server = socket.create_server(
        ('', 0), family=family, dualstack_ipv6=dual, backlog=self._size
      )
      self._token = secrets.token_hex(16)
      port = self._server.getsockname()[1]
      text = json.dumps([self._token, port, *addresses()]).encode()
      packet[: len(text)] = np.frombuffer(text, np.uint8)
    packet = multihost_utils.broadcast_one_to_all(packet)
    token, port, *hosts = json.loads(bytes(packet).rstrip(b'\0'))
    if self._index:
      hello = {'process': self._index, 'token': token}
      self._hub = reach(hosts, port, hello, seconds)
    self._lines: dict[int, Line] = {}
    self._strangers: list[Line] = []

  def _watch(self) -> None:
    """Runs on the watchdog's thread; if it fails, the process ends, too."""
    try:
      if self._index == 0:
        self._lead()
      else:
        self._follow()
    except Exception as error:
      self._end(f'its watchdog failed: {type(error).__name__}: {error}')

  # The thread of process 0.

  def _lead(self) -> None:
    next_send = time.monotonic()
    # Until then process 0 waits for others to connect, so that all are told.
    deadline = next_send + MOMENT_SECONDS
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
    """Accepts a connection that sends the token, as any program can connect."""
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
    # Closing a socket with unread data may discard the message that was sent,
    # so all data is read until the other processes have closed their ends.
    deadline = time.monotonic() + MOMENT_SECONDS
    lines: dict[Any, Any] = {w.socket: w for w in self._lines.values()}
    while lines and time.monotonic() < deadline:
      for ready in wait(list(lines), TICK_SECONDS):
        if lines[ready].receive() is None:
          del lines[ready]
    self._over.set()

  # The thread of every other process.

  def _follow(self) -> None:
    last_heard = next_send = time.monotonic()
    while not self._over.is_set():
      if time.monotonic() >= next_send:
        next_send = time.monotonic() + TICK_SECONDS
        peer = {
          'count': self._this_peer.num_stages,
          'where': self._this_peer.stage,
          'done': self._this_peer.is_done,
        }
        self._hub.send({**peer, 'failed': self._failure})
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

  # The end of any process.

  def _end(self, reason: str, settle: bool = True) -> None:
    """Ends this process, unless it ends by itself with an error of its own.

    Args:
      reason: Text that is printed.
      settle: Whether to wait first for a pending save, which needs process 0.
    """
    self._over.set()
    if self._failure:
      return
    text = f'moe_jax: process {self._index} of {self._size} ends: {reason}'
    print(text, file=sys.stderr, flush=True)
    if self._index:
      self._hub.socket.close()
    if settle and self.before_end is not None:
      # The main thread cannot call `before_end`, as it waits in a collective.
      with contextlib.suppress(Exception):
        self.before_end(min(_SAVE_SECONDS, self._silence / 4))
    sys.stdout.flush()
    os._exit(1)
