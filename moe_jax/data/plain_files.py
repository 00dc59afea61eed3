"""Reads files and texts that others wrote, such as a downloaded model's files.

`plain` finds a file only if it lies in the given folder and is neither a pipe
nor a device; no file of more than `MOST_BYTES` bytes is read.
"""

import fnmatch
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, cast

from moe_jax.errors import InputError

# The largest size of a file that is read. No config, index or tokenizer in use
# is as large; JSON of this size takes about ten times as much memory.
MOST_BYTES = 2**28
_SHOWN = 200  # characters of another library's message


def is_name(name: Any) -> bool:
  """Whether a value can only name a file that lies directly in a folder."""
  return (
    isinstance(name, str)
    and name not in ('', '.', '..')
    and name.isprintable()
    and not set(name) & {'/', '\\', ':'}
  )


def plain(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """The path of a regular file in a folder; None if no file has the name.

  A link may lead to another file of the folder or, in the cache of the Hugging
  Face hub, `models--*/snapshots/*`, of the same repository. Other links are
  refused, as a link in a download could lead to any file of this machine.

  Raises:
    ValueError: The name leads out of the folder, or to a pipe or anything else
      that is no regular file.
  """
  if not is_name(name):
    raise InputError(f'{name!r} is no name of a file in {folder}')
  path, allowed = folder / name, folder.resolve()
  if not os.path.lexists(path):
    return None
  if allowed.parent.name == 'snapshots':
    repository = allowed.parents[1]
    allowed = repository if repository.name.startswith('models--') else allowed
  target = pathlib.Path(os.path.realpath(path))
  if not target.is_relative_to(allowed):
    raise InputError(
      f'{path} is a link to {os.readlink(path)!r}, outside of {allowed}; it is '
      'not followed: put the file itself there'
    )
  if not path.is_file():
    raise InputError(f'{path} is no regular file')
  return path


def matching(
  folder: pathlib.Path, patterns: Sequence[str]
) -> Iterator[pathlib.Path]:
  """The plain files in a folder whose names match a pattern, sorted by name.

  Raises:
    ValueError: Something that is neither a plain file nor a folder has a name
      that matches a pattern.
  """
  for path in sorted(folder.iterdir()):
    is_match = any(fnmatch.fnmatchcase(path.name, p) for p in patterns)
    if is_match and (path.is_symlink() or not path.is_dir()):
      yield cast(pathlib.Path, plain(folder, path.name))


def read_bytes(path: pathlib.Path) -> bytes:
  """The content of a file.

  Raises:
    ValueError: The file has more than `MOST_BYTES` bytes.
  """
  size = path.stat().st_size
  if size > MOST_BYTES:
    raise InputError(f'{path} has {size} bytes, at most {MOST_BYTES} are read')
  return path.read_bytes()


def read_text(path: pathlib.Path) -> str:
  """The text of a UTF-8 file.

  Raises:
    ValueError: The file is not UTF-8, or has more than `MOST_BYTES` bytes.
  """
  return decoded(read_bytes(path), path)


def decoded(raw: bytes, where: Any, line: Callable | None = None) -> str:
  """The text of bytes of UTF-8, which messages call `where`.

  Given `line`, a function that returns the number of the line with which the
  bytes begin, a message also has the number of the line that is not UTF-8.

  Raises:
    ValueError: The bytes are not UTF-8.
  """
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    number = line and line() + raw.count(b'\n', 0, error.start)
    in_line = f' in line {number}' if line else ''
    raise InputError(f'{where} is not UTF-8{in_line}: {error}') from None


def encoded(text: Any, where: str) -> bytes:
  """A text, which messages call `where`, in UTF-8.

  Raises:
    ValueError: `text` is no text, or has half of a surrogate pair.
  """
  if not isinstance(text, str):
    raise InputError(f'{where}={text!r:.80} is no text')
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise InputError(
      f'{where}={text!r:.80} has a half of a character: {error}'
    ) from None


def check_text(text: Any, where: str) -> None:
  """Raises ValueError, naming `where`, unless `text` is a non-empty text."""
  if not encoded(text, where):
    raise InputError(f"{where}='' is to be a text that is not empty")


def parse_json(text: str, where: str | os.PathLike[str]) -> Any:
  """The value of a JSON text, which messages call `where`.

  Raises:
    ValueError: The text is no JSON, has NaN or infinities, or is nested too
      deeply.
  """

  def refuse(name: str) -> NoReturn:
    raise InputError(f'it has the value {name}')

  try:
    return json.loads(text, parse_constant=refuse)
  except RecursionError:
    raise InputError(f'{where} is no JSON: it is nested too deeply') from None
  except ValueError as error:
    raise InputError(f'{where} is no JSON: {first_line(error)}') from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a folder's JSON file; an empty dict if there is no file.

  Raises:
    ValueError: The file is a link out of its folder or no regular file, is not
      JSON, or holds no object.
  """
  if plain(path.parent, path.name) is None:
    return {}
  value = parse_json(read_text(path), path)
  if not isinstance(value, dict):
    raise InputError(f'{path} holds a {type(value).__name__}, not an object')
  return value


def first_line(error: BaseException) -> str:
  """The first 200 characters of the first line of a library's message."""
  return str(error).strip().split('\n', 1)[0][:_SHOWN]
