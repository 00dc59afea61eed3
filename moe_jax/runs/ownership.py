"""One job owns a folder: its workdir, and its directory of checkpoints.

The owner writes `owner.json` once, with a random id, its machine and process,
and a growing number, its beat, into `owner.beat` every few seconds. An owner on
the same machine is dead as soon as its process has ended, and an owner on
another machine once its beat has not changed for three periods, by the clock of
the job that waits. A restart after a kill is thus never blocked. Writing
`owner.json` also shows whether the folder can be written. Readers of a run
ignore both files.

Two jobs that start at once take turns by `flock`, where the file system has it.
A bucket has no `flock`: there the last of two writers wins, and the other
notices that it has lost.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from etils import epath

from moe_jax.errors import InputError
from moe_jax.runs.storage_errors import describe, storage_path

FILE_PREFIX = 'owner.'  # the names of all files about the owner begin with it
OWNER = f'{FILE_PREFIX}json'
BEAT = f'{FILE_PREFIX}beat'
_PROC = pathlib.Path('/proc')  # which systems other than Linux lack
_MOST_BYTES = 10_000  # no owner's file is longer

PERIOD_SECONDS = 10.0
_MISSED_BEATS = 3
# Seconds after which two jobs that wrote at once see which of them wrote last.
_SETTLE_SECONDS = 1.0
# Seconds to wait for a job that holds the lock, which takes milliseconds.
_TURN_SECONDS = 5.0


class Owner(NamedTuple):
  """The content of an owner's file.

  Attributes:
    id: A random text.
    host: The machine's name.
    boot: Text that is the same for all processes among which process ids mean
      the same: the ids of the machine's start and of the namespace of
      processes; without /proc the machine's hardware address.
    pid: The id of the process.
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
    return None if started is None else started == self.started != ''

  def __str__(self) -> str:
    return f'process {self.pid} on {self.host} since {self.since}'


def read(folder: epath.Path) -> Owner | None:
  """The owner in a folder's file; None if the file is missing or damaged."""
  try:
    with (folder / OWNER).open('rb') as file:
      owner = Owner(**json.loads(file.read(_MOST_BYTES)))
  except (FileNotFoundError, TypeError, ValueError, RecursionError):
    return None
  expected = Owner.__annotations__.items()
  has_types = all(type(getattr(owner, name)) is kind for name, kind in expected)
  return owner if has_types and owner.pid > 0 else None


def beat(folder: epath.Path) -> bytes:
  """The owner's last beat, which is only compared; b'' if there is none."""
  # File systems of buckets have errors of their own.
  with contextlib.suppress(Exception), (folder / BEAT).open('rb') as file:
    return file.read(_MOST_BYTES)
  return b''


def _boot_id() -> str:
  """Text that names this machine and namespace of processes; see `Owner`."""
  try:
    boot = (_PROC / 'sys/kernel/random/boot_id').read_text()
    return f'{boot.strip()} {os.readlink(_PROC / "self/ns/pid")}'
  except OSError:
    return f'{uuid.getnode():012x}'  # a random address, if there is none


def process_start(pid: int) -> str | None:
  """The start of a process; '' if it has ended, None if it cannot be seen."""
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
  # The process' name in parentheses may hold anything; the state is the first
  # field after it.
  state, *fields = stat.rpartition(')')[2].split()
  return '' if state in 'ZX' else fields[18]


class OwnedError(InputError):
  """Another job has the folder."""


class Ownership:
  """The folders that a job owns while it runs; process 0 owns them for all.

  Args:
    folders: The folders.
    message: Prints a line before this waits for another owner's beat.
    period: Seconds between two beats.
  """

  def __init__(
    self,
    folders: Iterable[epath.Path],
    message: Callable[[str], None] = print,
    *,
    period: float = PERIOD_SECONDS,
  ):
    self._owner = Owner.of_this_process()
    self._message, self._period = message, period
    self._folders: list[epath.Path] = []
    self._made_folders: list[epath.Path] = []
    self._end = threading.Event()
    self._beat_lock = threading.Lock()
    try:
      for folder in folders:
        self._take(folder)
    except BaseException:
      self.release()
      raise
    if self._folders:
      self._beat(1)
      threading.Thread(target=self._keep_beating, daemon=True).start()

  def confirm(self) -> None:
    """Checks that the folders are still this job's.

    Raises:
      OwnedError: Another job has taken a folder, or `owner.json` is missing.
    """
    for folder in self._folders:
      try:
        owner = read(folder)
      except Exception:  # file systems of buckets have their own errors
        continue  # storage that fails tells nothing; a save will say so
      if owner != self._owner:
        who = 'nobody: its owner.json is gone' if owner is None else owner
        raise OwnedError(
          f'{folder} now belongs to {who}; this job ({self._owner}) stops and '
          'writes nothing more'
        )

  def release(self) -> None:
    """Gives the folders back, and removes new folders that are still empty."""
    self._end.set()
    for folder in self._folders:
      with self._beat_lock, contextlib.suppress(Exception):
        if read(folder) in (self._owner, None):
          for name in (BEAT, OWNER):
            (folder / name).unlink(missing_ok=True)
    for folder in self._made_folders:
      with contextlib.suppress(OSError):
        os.rmdir(folder)

  def _take(self, folder: epath.Path) -> None:
    """Takes a folder; waits for the beat of an owner that may be alive."""
    self._make_folder(folder)
    stale: tuple[Owner, bytes] | None = None
    while True:
      with _turn(folder) as alone:
        owner = self._read_owner(folder)
        free = owner is None or owner.alive is False
        if free or (stale is not None and stale == (owner, beat(folder))):
          self._folders.append(folder)
          self._write_owner(folder)
          break
      if owner is None or owner.alive or stale is not None:
        raise _refusal(folder, owner)
      stale = owner, beat(folder)
      self._watch(folder, owner)
    if not alone:
      time.sleep(_SETTLE_SECONDS)
      if (owner := read(folder)) != self._owner:
        raise _refusal(folder, owner)

  def _watch(self, folder: epath.Path, owner: Owner) -> None:
    seconds = _MISSED_BEATS * self._period
    self._message(
      f'{folder} belongs to {owner}, of which nothing is known here; it is '
      f'taken over in {seconds:.0f} s unless that process is seen to live'
    )
    time.sleep(seconds)

  def _read_owner(self, folder: epath.Path) -> Owner | None:
    try:
      return read(folder)
    except Exception as error:
      raise _unwritable(folder, error) from None

  def _make_folder(self, folder: epath.Path) -> None:
    parents = [] if '://' in os.fspath(folder) else [folder, *folder.parents]
    try:
      missing = [parent for parent in parents if not parent.exists()]
      folder.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # file systems of buckets have their own
      raise _unwritable(folder, error) from None
    self._made_folders += missing

  def _write_owner(self, folder: epath.Path) -> None:
    text = json.dumps(self._owner._asdict(), indent=1)
    partial = folder / f'{OWNER}.{self._owner.id}'
    try:
      partial.write_text(text)
      partial.replace(folder / OWNER)
    except Exception as error:
      with contextlib.suppress(Exception):
        partial.unlink(missing_ok=True)
      raise _unwritable(folder, error) from None

  def _keep_beating(self) -> None:
    number = 1
    while not self._end.wait(self._period):
      number += 1
      self._beat(number)

  def _beat(self, number: int) -> None:
    for folder in self._folders:
      with self._beat_lock, contextlib.suppress(Exception):
        if not self._end.is_set() and read(folder) == self._owner:
          (folder / BEAT).write_text(f'{self._owner.id} {number}')


@contextlib.contextmanager
def owned(folders: Iterable[str | os.PathLike[str]]) -> Iterator[Ownership]:
  """Owns folders while the body runs, and gives them back after it.

  Args:
    folders: Local folders or URLs; missing ones are made, and removed again if
      nothing was written to them.

  Raises:
    OwnedError: Another job owns a folder.
    ValueError: A folder cannot be made or written.
  """
  paths = {storage_path(folder): None for folder in folders}
  ownership = Ownership(paths)
  try:
    yield ownership
  finally:
    ownership.release()


@contextlib.contextmanager
def _turn(folder: epath.Path) -> Iterator[bool]:
  """Holds the lock of a folder; gives False where the folder has no lock."""
  if '://' in os.fspath(folder):
    yield False
    return
  try:
    handle = os.open(folder, os.O_RDONLY)
  except OSError:
    yield False
    return
  try:
    yield _locked(handle)
  finally:
    os.close(handle)


def _locked(handle: int) -> bool:
  deadline = time.monotonic() + _TURN_SECONDS
  while time.monotonic() < deadline:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except BlockingIOError:
      time.sleep(0.01)
    except OSError:
      break  # network file systems may have no locks
  return False


def _refusal(folder: epath.Path, owner: Owner | None) -> OwnedError:
  return OwnedError(
    f'{folder} is in use by {owner}; wait for its end, or choose another folder'
  )


def _unwritable(folder: epath.Path, error: Exception) -> ValueError:
  cause = getattr(error, 'strerror', None) or describe(error)
  return InputError(
    f'{os.fspath(folder)} cannot be made or written: {cause}; choose another '
    'folder, or make room there'
  )
