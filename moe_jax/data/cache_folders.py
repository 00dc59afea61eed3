"""Folders of the cache, each written by one process for all others.

Not here: the files in a folder (`store.py`, `sources/tfds_reader.py`).
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
  """Fills `folder` by `write` unless it exists, and returns it.

  `write` fills a temporary folder beside it, which is then renamed, so a folder
  with its own name is complete. If several processes need it at once, one
  writes and the others wait; where the file system has no locks, several write
  and all take the folder that is renamed first.
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
    # A folder within it, as other users cannot read the temporary folder.
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
