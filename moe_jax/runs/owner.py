"""The owner of a folder: a process, by its machine, number and start."""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import time
import uuid
from typing import NamedTuple

from etils import epath

FILE_PREFIX = 'owner.'  # the names of all files about the owner begin with it
OWNER = f'{FILE_PREFIX}json'
BEAT = f'{FILE_PREFIX}beat'
_PROC = pathlib.Path('/proc')  # which systems other than Linux lack
_MOST_BYTES = 10_000  # no owner's file is longer


class Owner(NamedTuple):
  """The content of an owner's file.

  Attributes:
    id: A random text.
    host: The machine's name.
    boot: Text that is the same for all processes that see the same process
      numbers: of the machine's start, and of the namespace; without /proc it is
      the machine's hardware address.
    pid: The number of the process.
    started: The start of the process in ticks of the machine; '' if unknown.
    since: The time at which the process took the folder, for messages.
  """

  id: str
  host: str
  boot: str
  pid: int
  started: str
  since: str

  @classmethod
  def of_this_process(cls) -> 'Owner':
    """This process, with a new id."""
    return cls(
      id=secrets.token_hex(16),
      host=socket.gethostname(),
      boot=_boot_id(),
      pid=os.getpid(),
      started=process_start(os.getpid()) or '',
      since=time.strftime('%Y-%m-%d %H:%M:%S %z'),
    )

  @property
  def alive(self) -> bool | None:
    """Whether the process exists; None if this machine cannot tell."""
    this_machine = socket.gethostname(), _boot_id()
    if not self.boot or (self.host, self.boot) != this_machine:
      return None
    started = process_start(self.pid)
    return (
      None if started is None else bool(started) and started == self.started
    )

  def __str__(self) -> str:
    return f'process {self.pid} on {self.host} since {self.since}'


def read(folder: epath.Path) -> Owner | None:
  """The owner by the folder's file; None if there is none or it is damaged."""
  try:
    with (folder / OWNER).open('rb') as file:
      owner = Owner(**json.loads(file.read(_MOST_BYTES)))
  except (FileNotFoundError, TypeError, ValueError, RecursionError):
    return None
  expected = Owner.__annotations__.items()
  has_types = all(type(getattr(owner, name)) is kind for name, kind in expected)
  return owner if has_types and owner.pid > 0 else None


def beat(folder: epath.Path) -> bytes:
  """The last beat, which is only compared; b'' if there is none."""
  # File systems of buckets have errors of their own.
  with contextlib.suppress(Exception), (folder / BEAT).open('rb') as file:
    return file.read(_MOST_BYTES)
  return b''


def _boot_id() -> str:
  """Text of this machine, and of its namespace of processes; see `Owner`."""
  try:
    boot = (_PROC / 'sys/kernel/random/boot_id').read_text()
    return f'{boot.strip()} {os.readlink(_PROC / "self/ns/pid")}'
  except OSError:
    return f'{uuid.getnode():012x}'  # a random one, if it has none


def process_start(pid: int) -> str | None:
  """The start of a process; '' if it is gone, None if it cannot be seen."""
  try:
    stat = (_PROC / f'{pid}/stat').read_text(errors='replace')
  except OSError:
    try:
      os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
      return ''
    except OSError:
      pass
    return None  # another user's process, or there is no /proc
  # The name before may hold anything; the state is the first field after it.
  state, *fields = stat.rpartition(')')[2].split()
  return '' if state in 'ZX' else fields[18]
