"""Compiled programs on disk, so that a later process need not compile them.

JAX reads and writes the files; only their place, their bound and when JAX goes
without them are decided here. A program is found by its text, JAX's version,
the flags of XLA and the kind of the devices, so what is found computes what
compiling would. JAX's own bound, `jax_compilation_cache_max_size`, is not used:
a process that is killed while it writes leaves a file without the time of its
last use, after which no further program is written. A file that was cut short
is named in a warning at each start, and its program compiled, until the file is
deleted.
"""

import contextlib
import os
import pathlib
import tempfile

import jax

from moe_jax.data.cache_folders import cache_root

OFF = 'off'
MOST_BYTES = 2 * 2**30
HELP = (
  'Folder of compiled programs, which a later start need not compile again. By '
  "default it is $JAX_COMPILATION_CACHE_DIR, or else 'compiled' in "
  '$MOE_JAX_CACHE or ~/.cache/moe_jax, where what was not used for longest is '
  f'deleted beyond {MOST_BYTES // 2**30} GiB, and several processes keep none; '
  f'{OFF!r}: no program is kept.'
)
# In seconds; programs that compile faster than this are not kept.
_LEAST_TIME = 0.1
_TIME_OPTION = 'jax_persistent_cache_min_compile_time_secs'


def use(folder: str = '') -> str:
  """Makes this process keep compiled programs; call it before any is compiled.

  A folder that JAX was told of (by $JAX_COMPILATION_CACHE_DIR) is left as it
  is, and $JAX_ENABLE_COMPILATION_CACHE=false is obeyed. The default folder is
  made, and its least recently used files are deleted beyond `MOST_BYTES`; no
  file is deleted elsewhere. Several processes keep programs only in a folder
  that was given: where each host has a home of its own, some would find what
  others compile, and wait for them.

  Args:
    folder: A path; OFF, to keep none; '' is the default of `HELP`.

  Returns:
    A sentence that says why programs are not kept, for the user to read; ''
    where they are, or where the user wants it so.
  """
  if folder == OFF:
    jax.config.update('jax_enable_compilation_cache', False)
    return ''
  if not jax.config.values['jax_enable_compilation_cache']:
    return folder and _not_kept('JAX_ENABLE_COMPILATION_CACHE is false')
  jax_folder = jax.config.values['jax_compilation_cache_dir']
  if not folder and (jax_folder or jax.distributed.is_initialized()):
    return ''
  cache_folder = folder
  if '://' not in folder:
    try:
      path = pathlib.Path(folder or cache_root() / 'compiled').expanduser()
      path.mkdir(parents=True, exist_ok=True)
      tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as error:  # the latter if there is no home
      return _not_kept(error)
    if not folder:
      _delete_oldest(path)
    cache_folder = str(path)
  jax.config.update('jax_compilation_cache_dir', cache_folder)
  if _TIME_OPTION.upper() not in os.environ:
    jax.config.update(_TIME_OPTION, _LEAST_TIME)
  return ''


def _not_kept(reason: object) -> str:
  return f'compiled programs are not kept: {reason}'


def _delete_oldest(folder: pathlib.Path) -> None:
  """Deletes the programs that nobody used for longest, beyond `MOST_BYTES`."""
  programs = []
  for path in folder.glob('*-cache'):
    with contextlib.suppress(OSError):  # another process has deleted it
      stat = path.stat()
      last_used = max(stat.st_mtime, stat.st_atime)
      programs.append((last_used, stat.st_size, path))
  total = 0
  for _, size, path in sorted(programs, reverse=True):
    total += size
    if total > MOST_BYTES:
      with contextlib.suppress(OSError):
        path.unlink()
