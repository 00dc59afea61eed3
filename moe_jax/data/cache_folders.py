"""Folders of the cache: written whole by one process, found by the others.

Not here: what stands in a folder (`store.py`, `sources/tfds_reader.py`).
"""

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator


def cache_root(cache_dir: str = '') -> pathlib.Path:
  """`cache_dir`, else $MOE_JAX_CACHE, else ~/.cache/moe_jax."""
  root = cache_dir or os.environ.get('MOE_JAX_CACHE') or '~/.cache/moe_jax'
  return pathlib.Path(root).expanduser()


def prepared(
  folder: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> pathlib.Path:
  """`folder`, filled by `write` unless it is there already.

  `write` fills a temporary folder beside it, which is then renamed: a folder
  under its own name is whole. Of processes that want it at once, one writes and
  the others wait; where the file system has no locks several write, one wins
  and the others take the winner's.
  """
  if folder.is_dir():
    return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  with locked(folder):
    if not folder.is_dir():
      _prepare(folder, write)
  return folder


def _prepare(
  folder: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  with tempfile.TemporaryDirectory(
    prefix=f'.{folder.name}-', dir=folder.parent
  ) as temporary:
    # One level down, since the temporary folder is closed to other users.
    unfinished = pathlib.Path(temporary) / folder.name
    unfinished.mkdir()
    write(unfinished)
    try:
      unfinished.rename(folder)
    except OSError:
      if not folder.is_dir():
        raise


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Keeps other processes out while the body runs, by a lock file beside.

  The lock saves work and is no guarantee: it keeps nobody out where the folder
  cannot be written or has no locks, nor a process that waits for a lock file
  which is then removed. The lock ends with the process that holds it, however
  that process ends.
  """
  lock = path.parent / f'.{path.name}.lock'
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):
      file = stack.enter_context(lock.open('a'))
      fcntl.lockf(file, fcntl.LOCK_EX)
      stack.callback(lock.unlink, missing_ok=True)
    yield
