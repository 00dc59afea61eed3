"""Lets only one job write to a run's workdir and directory of checkpoints.

A job holds the lock `owner.lock` while it runs, which the system frees when the
process ends, however it ends: a restart after a kill waits for nothing, and the
second of two jobs is refused. Buckets and some network file systems have no
locks, or locks within one machine only. So the job also writes `owner.json`,
with a random id that it confirms before each save and each row of metrics: of
two jobs the last that began goes on, with a warning, and the other ends. Files
about the owner are removed when the job ends, and readers of a run ignore them.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import filelock
from etils import epath

from moe_jax.cli import complain
from moe_jax.devices import from_first, is_first
from moe_jax.errors import InputError
from moe_jax.runs.storage_errors import describe, storage_path

FILE_PREFIX = 'owner.'  # the names of all files about the owner begin with it
OWNER = f'{FILE_PREFIX}json'
LOCK = f'{FILE_PREFIX}lock'


class Owner(NamedTuple):
  """The job that owns a folder, as `owner.json` in the folder describes it.

  Attributes:
    id: A random text, which no other job has.
    host: The name of the machine on which the job's process 0 runs.
    pid: The id of that process.
    since: The time at which the process took the folder, for messages.
  """

  id: str
  host: str
  pid: str
  since: str

  def __str__(self) -> str:
    return f'process {self.pid} on {self.host} since {self.since}'


class OwnedError(InputError):
  """Another job owns a folder, or the folder's `owner.json` has gone."""


def read(folder: epath.Path) -> Owner | None:
  """Reads a folder's `owner.json`; None if the file is missing or damaged."""
  try:
    values = json.loads((folder / OWNER).read_bytes())
    return Owner(*(str(values[name]) for name in Owner._fields))
  except (FileNotFoundError, KeyError, TypeError, ValueError, RecursionError):
    return None


def holder(folder: epath.Path) -> Owner | None:
  """The job that holds a folder's lock; None if it is free or has no lock."""
  try:
    if (folder / LOCK).exists():
      with _lock(folder):
        pass
  except filelock.Timeout:
    return read(folder)
  except (OSError, NotImplementedError):  # no locks, or no permission
    pass
  return None


@contextlib.contextmanager
def owned(
  folders: Iterable[str | os.PathLike[str]],
) -> Iterator[Callable[[], None]]:
  """Owns folders while the body runs; every process of a run enters this.

  Process 0 owns the folders for all processes, and its errors are raised in
  every process.

  Args:
    folders: Local folders or URLs; missing ones are made, and removed again if
      nothing was written to them.

  Yields:
    A function that raises OwnedError if a folder is not this job's any more:
    another job has taken it, or `owner.json` is missing.

  Raises:
    OwnedError: Another job owns a folder.
    ValueError: A folder cannot be made or written.
  """
  since = time.strftime('%Y-%m-%d %H:%M:%S %z')
  random_id, pid = secrets.token_hex(16), str(os.getpid())
  owner = Owner(random_id, socket.gethostname(), pid, since)
  paths: dict[epath.Path, None] = {}

  def confirm() -> None:
    for path in paths:
      try:
        now = read(path)
      except Exception:  # file systems of buckets have their own errors
        continue  # failing storage tells no owner; a save will fail too
      if now != owner:
        raise OwnedError(
          f'{path} now belongs to {now or f"nobody: its {OWNER} is gone"}; '
          f'this job ({owner}) stops and writes nothing more'
        )

  with contextlib.ExitStack() as stack:
    error = None
    try:
      paths |= dict.fromkeys(map(storage_path, folders if is_first() else ()))
      for path in paths:
        _take(path, owner, stack)
    except InputError as first_error:
      error = first_error
    if text := from_first(str(error or '')):
      raise error or InputError(text)
    yield confirm


def _take(
  folder: epath.Path, owner: Owner, stack: contextlib.ExitStack
) -> None:
  """Makes `owner` the owner of a folder until `stack` ends.

  Raises:
    OwnedError: Another job holds the folder's lock.
    ValueError: The folder cannot be made or written.
  """
  is_local, is_locked = '://' not in os.fspath(folder), False
  try:
    for path in [*reversed(folder.parents), folder] if is_local else ():
      if not path.exists():
        stack.callback(_quietly, os.rmdir, path)
    folder.mkdir(parents=True, exist_ok=True)
    if is_local:
      is_locked = _hold_lock(folder, stack)
    before = read(folder)
    stack.callback(_quietly, _give_back, folder, owner)
    (folder / OWNER).write_text(json.dumps(owner._asdict(), indent=1))
  except InputError:
    raise
  except Exception as error:  # file systems of buckets have their own errors
    cause = getattr(error, 'strerror', None) or describe(error)
    raise InputError(
      f'{os.fspath(folder)} cannot be made or written: {cause}; choose another '
      'folder, or make room there'
    ) from None
  if before and not (is_locked and before.host == owner.host):
    complain(
      f'{folder} was of {before}, which has not given it back; this job takes '
      'it, and that process ends before its next save if it still runs'
    )


def _lock(folder: epath.Path) -> filelock.BaseFileLock:
  # A soft lock would outlive a process that is killed.
  return filelock.FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)


def _hold_lock(folder: epath.Path, stack: contextlib.ExitStack) -> bool:
  """Holds a folder's lock until `stack` ends; False if storage has no locks.

  Raises OwnedError if another job holds it.
  """
  try:
    stack.enter_context(_lock(folder))
  except filelock.Timeout:
    raise OwnedError(
      f'{folder} is in use by {read(folder) or "another job"}; wait for its '
      'end, or choose another folder'
    ) from None
  except (OSError, NotImplementedError):
    return False
  # Two jobs cannot both get the lock by this removal: a job that waits for the
  # lock of a removed file does not get it.
  stack.callback(_quietly, (folder / LOCK).unlink)
  return True


def _give_back(folder: epath.Path, owner: Owner) -> None:
  if read(folder) in (owner, None):
    (folder / OWNER).unlink()


def _quietly(function: Callable[..., None], *args: object) -> None:
  with contextlib.suppress(Exception):  # buckets have errors of their own
    function(*args)
