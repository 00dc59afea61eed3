"""Folders of the cache, each written by one process for all others.

A folder has a list of its files with their sizes and sha256. Whenever it is
opened, all sizes are checked, and the digests of files up to `SMALL` bytes;
those of larger files take about 0.5 s per GB where they are not remembered of
unchanged files (`file_digests.py`), and can be left out. A damaged
folder is named and not remade: damage tells of a failing disk or of a program
that wrote there, other processes may be reading the folder, and only its user
knows. `whole_folder` makes a folder outside the cache.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from types import MappingProxyType

from moe_jax.data import file_digests
from moe_jax.data.plain_files import parse_json, read_text
from moe_jax.data.read_only import check_may_prepare
from moe_jax.errors import InputError, writing

LIST = 'files.json'
FORMAT = 2  # version of folders, a part of their names; 1 had no list
SMALL = 2**20
_Facts = dict[str, list]  # size and sha256 by path


def cache_root(cache_dir: str = '') -> pathlib.Path:
  """`cache_dir`, else $MOE_JAX_CACHE, else ~/.cache/moe_jax."""
  root = cache_dir or os.environ.get('MOE_JAX_CACHE') or '~/.cache/moe_jax'
  return pathlib.Path(root).expanduser()


def prepared(
  folder: pathlib.Path,
  write: Callable[[pathlib.Path], None],
  *,
  digests: bool = True,
) -> pathlib.Path:
  """Fills `folder` by `write` unless it exists, and returns it.

  `write` fills a temporary folder beside it, which is then renamed, so a folder
  with its own name is complete. If several processes need it at once, one
  writes and the others wait; where the file system has no locks, several write
  and all take the folder that is renamed first.

  Args:
    folder: The folder.
    write: Writes the files of the folder into the folder that it is given.
    digests: Whether the digests of large files are checked, too.

  Raises:
    ValueError: A file of the folder is damaged or missing.
    NotPreparedError: The folder is missing within `reading_only`.
  """
  if folder.is_dir():
    verify(folder, digests=digests)
    return folder
  check_may_prepare(os.fspath(folder))
  folder.parent.mkdir(parents=True, exist_ok=True)
  with locked(folder):
    if not folder.is_dir():
      _prepare(folder, write)
  return folder


def _prepare(
  folder: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  with new_folder(folder.parent, folder.name) as unfinished:
    write(unfinished)
    publish(unfinished, folder)


@contextlib.contextmanager
def new_folder(parent: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
  """A folder of this process alone; the body may move it elsewhere.

  Whatever the folder still holds after the body is removed.

  Args:
    parent: Folder on whose file system the new one is.
    name: Name of the folder, which lies in a temporary folder.
  """
  with (
    writing(parent / name),
    tempfile.TemporaryDirectory(
      prefix=f'.{name}-', dir=parent, ignore_cleanup_errors=True
    ) as private_parent,
  ):
    # The folder lies within it, as other users cannot read a temporary one.
    folder = pathlib.Path(private_parent) / name
    folder.mkdir()
    yield folder


def publish(
  unfinished: pathlib.Path,
  folder: pathlib.Path,
  old_facts: Mapping[str, Sequence] = MappingProxyType({}),
) -> None:
  """Lists the files of a folder and gives it its name, unless it is taken.

  Args:
    unfinished: The folder with its files, on the same file system.
    folder: Path that the folder gets.
    old_facts: Size and sha256 of files whose digests are not read again.
  """
  facts = {name: list(fact) for name, fact in old_facts.items()}
  facts |= _facts(unfinished, digests=True, skipped_names=old_facts)
  (unfinished / LIST).write_text(_text(facts), encoding='utf-8')
  try:
    unfinished.rename(folder)
  except OSError:
    if not folder.is_dir():
      raise


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock on `path` while the body runs, by a lock file beside it.

  The lock saves work but is no guarantee: other processes are not kept out
  where the folder cannot be written or has no locks, or if they wait for a lock
  file that is then removed. The lock ends with the process that holds it,
  however that process ends.
  """
  lock = path.parent / f'.{path.name}.lock'
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):
      file = stack.enter_context(lock.open('a'))
      fcntl.lockf(file, fcntl.LOCK_EX)
      stack.callback(lock.unlink, missing_ok=True)
    yield


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder for files of a user, which gets its name after the body.

  So `folder` is whole once it is there, and of two commands that write it at
  once the second fails. What a killed command has left beside it is replaced.

  Raises:
    ValueError: `folder` is neither new nor empty.
  """
  folder = folder.resolve()
  unfinished = folder.with_name(f'.{folder.name}.unfinished')
  folder.parent.mkdir(parents=True, exist_ok=True)
  with locked(folder), writing(folder):
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
      raise InputError(f'{folder} is there already; give a new or empty folder')
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
      yield unfinished
      unfinished.rename(folder)
    except BaseException:
      shutil.rmtree(unfinished, ignore_errors=True)
      raise


def verify(folder: pathlib.Path, *, digests: bool) -> None:
  """Raises ValueError, with advice, unless the files are those written.

  Args:
    folder: The folder.
    digests: Whether the digests of large files are checked, too.
  """
  try:
    text = read_text(folder / LIST)
    listed_facts = parse_json(text, LIST)
    # Texts are compared, as a changed space or key would be overlooked.
    if not isinstance(listed_facts, dict) or text != _text(listed_facts):
      raise InputError(f'{LIST} is not as it was written')
    actual_facts = _facts(folder, digests=digests)
    for path in sorted(listed_facts):  # other files harm nobody
      _check(path, listed_facts.get(path), actual_facts.get(path))
  except FileNotFoundError:
    reason = f'{LIST} is missing'
  except InputError as error:
    reason = str(error)
  else:
    return
  raise InputError(
    f'{folder} is damaged: {reason}; delete the folder, and it is made anew'
  )


def _check(path: str, listed: list | None, actual: list | None) -> None:
  if actual is None or not listed or not isinstance(listed, list):
    raise InputError(f'{path} is missing')
  if listed[0] != actual[0]:
    raise InputError(f'{path} has {actual[0]} bytes, not {listed[0]}')
  if actual[1] and listed != actual:
    raise InputError(f'{path} has changed since it was written (sha256)')


def _facts(
  folder: pathlib.Path,
  *,
  digests: bool,
  skipped_names: Container[str] = (),
) -> _Facts:
  """Size and sha256 of each file; '' for a large one without `digests`.

  Digests of large files are remembered beside the folder. Files in
  `skipped_names` are left out.
  """
  facts, large = {}, {}
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder).as_posix()
    if path.is_dir() or name == LIST or path.name.startswith('.nfs'):
      continue
    if name in skipped_names:
      continue
    size, digest = path.stat().st_size, ''
    if size > SMALL:
      large[path] = name
    else:
      with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    facts[name] = [size, digest]
  if digests and large:
    memory = folder.parent / f'.{folder.name}.digests'
    for path, digest in file_digests.sha256s(large, memory).items():
      facts[large[path]][1] = digest
  return facts


def _text(facts: _Facts) -> str:
  return json.dumps(facts, indent=1, sort_keys=True) + '\n'
