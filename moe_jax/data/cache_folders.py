"""Folders of the cache, each written by one process for all others.

A dry run only reads the cache: within `reading_only` nothing is written.

A folder has a list of its files with their sizes and sha256. Whenever a folder
is opened, all sizes are checked, and the digests of files up to `SMALL` bytes;
the digests of larger files take about 0.5 s per GB and need not be checked. So
that gigabytes are not read whenever a run starts, digests of large files are
remembered: a remembered digest is taken while the file has the same size, times
and inode, by which git notices changes, too. A digest is remembered only if
the file was at rest for some seconds when it was read. A damaged folder is
named in an error and not made anew: the disk may be failing, a program may have
written to the folder, or other processes may be reading it, and only its user
can tell. Where the cache also has a URL, a folder that exists at the URL is
copied from there, and any other folder is copied to the URL once it is made.
`whole_folder` makes a folder outside the cache.
"""

import contextlib
import contextvars
import glob
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import filelock

from moe_jax.data import urls
from moe_jax.data.plain_files import parse_json, read_json, read_text
from moe_jax.data.urls import LIST, stamp_of
from moe_jax.errors import InputError, writing

FORMAT = 3  # version of the cache's folders, a part of their names
SMALL = 2**20
# A file that was written less than so many seconds before it was read is read
# again the next time, as a later change may have left its times the same.
_REST_SECONDS = 2
_READ_ONLY = contextvars.ContextVar('read_only', default=False)


class NotPreparedError(InputError):
  """Data is missing in the cache while `reading_only` forbids preparing it."""


@contextlib.contextmanager
def reading_only() -> Iterator[None]:
  """Forbids, while the body of `with` runs, to prepare data for the cache.

  Code that would have to prepare data then raises NotPreparedError.
  """
  before = _READ_ONLY.set(True)
  try:
    yield
  finally:
    _READ_ONLY.reset(before)


def check_may_prepare(description: str) -> None:
  """Raises NotPreparedError within `reading_only`.

  Args:
    description: Text that names the data to prepare, for the message.
  """
  if _READ_ONLY.get():
    raise NotPreparedError(f'{description} is not prepared yet')


def prepared(
  folder: pathlib.Path,
  write: Callable[[pathlib.Path], None],
  *,
  digests: bool = True,
  url: str = '',
) -> pathlib.Path:
  """Fills `folder` by `write`, unless `folder` exists, and returns its path.

  `write` fills a temporary folder in the same parent, which is then renamed to
  `folder`, so that `folder` is complete once it exists. If several processes
  need `folder` at once, one process writes and the others wait. Where the file
  system has no locks, several processes write, and all use the folder that is
  renamed first.

  Args:
    folder: Path of the folder.
    write: The function that fills the folder that it is given.
    digests: Whether digests of large files are checked if `folder` exists.
    url: URL of a folder with the same files. If the folder at the URL is whole,
      it is copied to `folder`; otherwise `folder` is written and copied to the
      URL. '' stands for no URL.

  Raises:
    ValueError: A file of the folder is damaged or missing.
    NotPreparedError: The folder is missing within `reading_only`.
  """
  if folder.is_dir():
    verify(folder, digests=digests)
    return folder
  check_may_prepare(os.fspath(folder))
  folder.parent.mkdir(parents=True, exist_ok=True)
  with locked(folder) as alone:
    if not folder.is_dir():
      with _new_folder(folder, alone) as unfinished:
        if url and urls.fetch(url, unfinished):
          verify(unfinished, digests=True, where=url)
        else:
          write(unfinished)
          facts = {
            name: [path.stat().st_size, sha256(path)]
            for name, path in _files(unfinished).items()
          }
          (unfinished / LIST).write_text(_text(facts), encoding='utf-8')
          if url:
            urls.upload(unfinished, url)
        try:
          unfinished.rename(folder)
        except OSError:  # another process was faster, where there are no locks
          if not folder.is_dir():
            raise
  return folder


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path, alone: bool) -> Iterator[pathlib.Path]:
  """Yields a new folder of this process, which the body renames to `folder`.

  The new folder lies in a temporary folder beside `folder`. If the body has not
  renamed the new folder, it is removed with all that it holds. Where `alone`
  says that no other process is writing `folder`, temporary folders that killed
  processes have left are removed first.
  """
  parent, prefix = folder.parent, f'.{folder.name}.unfinished-'
  for left in parent.glob(f'{glob.escape(prefix)}*') if alone else ():
    shutil.rmtree(left, ignore_errors=True)
  with (
    writing(folder),
    tempfile.TemporaryDirectory(
      prefix=prefix, dir=parent, ignore_cleanup_errors=True
    ) as private_parent,
  ):
    # The new folder lies within the temporary folder, as the mode of the latter
    # keeps other users out and would remain when it is renamed.
    unfinished = pathlib.Path(private_parent) / folder.name
    unfinished.mkdir()
    yield unfinished


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[bool]:
  """Holds a lock on `path` while the body runs, by a file beside `path`.

  Yields whether the lock is held.

  The lock saves work but is no guarantee: other processes are not kept out
  where the folder cannot be written or has no locks, or if they wait for a lock
  file that is then removed. The lock ends with the process that holds it,
  however that process ends.
  """
  lock = filelock.FileLock(path.parent / f'.{path.name}.lock')
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError, NotImplementedError):
      stack.enter_context(lock)
      stack.callback(pathlib.Path(lock.lock_file).unlink, missing_ok=True)
    yield lock.is_locked


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a new folder for the body to fill, then renames it to `folder`.

  So `folder` is whole once it exists. Of two commands that write `folder` at
  once the second fails. Where the file system has locks, unfinished folders
  that killed commands have left beside `folder` are removed.

  Raises:
    ValueError: `folder` is neither new nor empty, or is a mount point.
  """
  folder = folder.resolve()
  folder.parent.mkdir(parents=True, exist_ok=True)
  with locked(folder) as alone:
    check_free(folder)
    with _new_folder(folder, alone) as unfinished:
      yield unfinished
      unfinished.rename(folder)


def check_free(folder: pathlib.Path) -> None:
  """Raises ValueError for a file, a mount point or a folder with content."""
  if os.path.ismount(folder):
    raise InputError(f'{folder} is a mount point; give a new folder in it')
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f'{folder} is there already; give a new or empty folder')


def verify(folder: pathlib.Path, *, digests: bool, where: str = '') -> None:
  """Raises ValueError unless a folder's files are as they were written.

  Digests of large files are checked only with `digests`. The message advises to
  delete the folder, which it calls `where`, or by its path if `where` is ''.
  """
  try:
    text = read_text(folder / LIST)
    listed_facts = parse_json(text, LIST)
    # The texts are compared, not the parsed values, so that even a changed
    # space in the list is found.
    if not isinstance(listed_facts, dict) or text != _text(listed_facts):
      raise InputError(f'{LIST} is not as it was written')
    paths, small, large = _files(folder), [], []
    # Only listed files are checked; other files in the folder do no harm.
    for name, listed in sorted(listed_facts.items()):
      if name not in paths or not listed or not isinstance(listed, list):
        raise InputError(f'{name} is missing')
      size = paths[name].stat().st_size
      if listed[0] != size:
        raise InputError(f'{name} has {size} bytes, not {listed[0]}')
      (large if size > SMALL else small).append(paths[name])
    found = {path: sha256(path) for path in small}
    if digests and large:
      found |= sha256s(large, folder.parent / f'.{folder.name}.digests')
    for name, path in paths.items():
      if path in found and listed_facts[name][1:] != [found[path]]:
        raise InputError(f'{name} has changed since it was written (sha256)')
  except (FileNotFoundError, InputError) as error:
    is_lost = isinstance(error, FileNotFoundError)
    reason = f'{LIST} is missing' if is_lost else error
    raise InputError(
      f'{where or folder} is damaged: {reason}; delete the folder to renew it'
    ) from None


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The path of each file of a folder, but `LIST`, by its path in the folder.

  Files `.nfs*`, which NFS keeps for deleted files in use, are left out, too.
  """
  paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob('*')}
  return {
    name: path
    for name, path in sorted(paths.items())
    if path.is_file() and name != LIST and not path.name.startswith('.nfs')
  }


def _text(facts: dict[str, list]) -> str:
  """The content of the file `LIST`: JSON of each file's [size, sha256]."""
  return json.dumps(facts, indent=1, sort_keys=True) + '\n'


def sha256s(
  paths: Iterable[pathlib.Path], memory: pathlib.Path
) -> dict[pathlib.Path, str]:
  """The sha256 of each file, in hexadecimal digits.

  Args:
    paths: The files.
    memory: File that keeps the digests, so that unchanged files are not read
      again; it is not written within `reading_only` or where it cannot be.
  """
  old_entries, new_entries, digests = {}, {}, {}
  with contextlib.suppress(OSError, InputError):
    old_entries = read_json(memory)
  for path in paths:
    name, stamp, now = str(path.absolute()), stamp_of(path), time.time_ns()
    entry = old_entries.get(name, [])
    is_known = isinstance(entry, list) and entry[:-1] == stamp
    digests[path] = entry[-1] if is_known else sha256(path)
    if max(stamp[1:3]) + _REST_SECONDS * 10**9 < now:
      new_entries[name] = [*stamp, digests[path]]
  if new_entries != old_entries and not _READ_ONLY.get():
    with contextlib.suppress(OSError):
      memory.parent.mkdir(parents=True, exist_ok=True)
      unfinished = memory.with_name(f'.{memory.name}.{os.getpid()}')
      unfinished.write_text(json.dumps(new_entries), encoding='utf-8')
      unfinished.replace(memory)
  return digests


def sha256(path: pathlib.Path) -> str:
  """The sha256 of a file's present content, in hexadecimal digits."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
