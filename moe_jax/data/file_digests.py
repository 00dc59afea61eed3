"""The sha256 of files, remembered until their size, times or inode change.

A file is trusted to be unchanged as git trusts it: by what the file system
says of it, and only if it was at rest for some seconds when it was read. So
gigabytes are read through once, not whenever a run starts.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable

from moe_jax.data.plain_files import parse_json, read_text
from moe_jax.data.read_only import may_write
from moe_jax.errors import InputError

# A file that was written less than so many seconds before it was read is read
# again the next time, as its times may not tell a later change.
_REST_SECONDS = 2


def sha256s(
  paths: Iterable[pathlib.Path], memory: pathlib.Path
) -> dict[pathlib.Path, str]:
  """The sha256 of each file, in hexadecimal digits.

  Args:
    paths: The files.
    memory: File that keeps the digests; it is written anew if one has changed,
      and stays as it is within `reading_only` or where it cannot be written.
  """
  old_entries, new_entries, digests = _read_entries(memory), {}, {}
  for path in paths:
    name, stamp, now = str(path.absolute()), stamp_of(path), time.time_ns()
    if name in old_entries and old_entries[name][:-1] == stamp:
      digest = old_entries[name][-1]
    else:
      with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    digests[path] = digest
    if max(stamp[1:3]) + _REST_SECONDS * 10**9 < now:
      new_entries[name] = [*stamp, digest]
  if new_entries != old_entries and may_write():
    _write_entries(memory, new_entries)
  return digests


def stamp_of(path: pathlib.Path) -> list[int]:
  """Size, times of changes in nanoseconds, and inode of a file."""
  stat = path.stat()
  return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_entries(memory: pathlib.Path) -> dict[str, list]:
  try:
    entries = parse_json(read_text(memory), memory)
  except (OSError, InputError):
    return {}
  is_valid = isinstance(entries, dict) and all(
    isinstance(entry, list) and len(entry) == 5 for entry in entries.values()
  )
  return entries if is_valid else {}


def _write_entries(memory: pathlib.Path, entries: dict[str, list]) -> None:
  with contextlib.suppress(OSError):
    memory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = memory.with_name(f'.{memory.name}.{os.getpid()}')
    unfinished.write_text(json.dumps(entries), encoding='utf-8')
    unfinished.replace(memory)
