"""Compiled programs on disk, so that a later process need not compile them.

JAX reads and writes the files; only their place, their bound and when JAX goes
without them are decided here. A program is found by its text, JAX's version,
the flags of XLA and the kind of the devices, so what is found computes what
compiling would. JAX's own bound, `jax_compilation_cache_max_size`, is not used:
a process that is killed while it writes leaves a file without the time of its
last use, after which no further program is written. A file that was cut short
is named in a warning, and its program compiled.
"""

import contextlib
import os
import pathlib
import tempfile

import jax

from moe_jax.data.cache_folders import cache_root

OFF = 'off'
HELP = (
  'Folder of compiled programs, which a later start need not compile again. By '
  "default it is $JAX_COMPILATION_CACHE_DIR, or else 'compiled' in "
  f'$MOE_JAX_CACHE or ~/.cache/moe_jax; {OFF!r}: no program is kept.'
)
MOST_BYTES = 2 * 2**30
# In seconds; programs that compile faster than this are not kept.
_LEAST_TIME = 0.1
_TIME = 'jax_persistent_cache_min_compile_time_secs'


def use(folder: str = '') -> str:
  """Makes this process keep compiled programs; before it compiles the first.

  A folder that JAX was told of (by $JAX_COMPILATION_CACHE_DIR) is left as it
  is, and $JAX_ENABLE_COMPILATION_CACHE=false is obeyed. Any other folder is
  made, and its oldest files are deleted beyond `MOST_BYTES`.

  Args:
    folder: A path; OFF, to keep none; '' is the default of `HELP`.

  Returns:
    A sentence that says why programs are not kept, for the user to read; ''
    where they are, or where the user wants it so.
  """
  if folder == OFF:
    jax.config.update('jax_enable_compilation_cache', False)
  known = jax.config.values['jax_compilation_cache_dir']
  enabled = jax.config.values['jax_enable_compilation_cache']
  if not enabled or (known and not folder):
    return ''
  place = folder or str(cache_root() / 'compiled')
  if '://' not in place:
    path = pathlib.Path(place).expanduser()
    try:
      path.mkdir(parents=True, exist_ok=True)
      tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
      return f'compiled programs are not kept: {error}'
    _delete_oldest(path)
    place = str(path)
  jax.config.update('jax_compilation_cache_dir', place)
  if _TIME.upper() not in os.environ:
    jax.config.update(_TIME, _LEAST_TIME)
  return ''


def _delete_oldest(folder: pathlib.Path) -> None:
  """Deletes the programs that were written first, beyond `MOST_BYTES`."""
  facts = []
  for path in folder.glob('*-cache'):
    with contextlib.suppress(OSError):  # another process has deleted it
      stat = path.stat()
      facts.append((stat.st_mtime, stat.st_size, path))
  total = 0
  for _, size, path in sorted(facts, reverse=True):
    total += size
    if total > MOST_BYTES:
      with contextlib.suppress(OSError):
        path.unlink()
