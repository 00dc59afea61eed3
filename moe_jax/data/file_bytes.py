"""Bytes of a part of a file, read in order, and their line numbers."""

import io
import pathlib
from collections.abc import Callable

from moe_jax.data import file_formats
from moe_jax.errors import InputError


class PartBytes:
  """The bytes of a part of a file.

  Attributes:
    path: The file.
    read: Number of bytes that have been taken.
    lines: Number of lines that the caller has counted.
  """

  def __init__(
    self,
    path: pathlib.Path,
    stream: io.BufferedIOBase,
    begin: int,
    end: int | None,
  ):
    """Takes a stream at the part's begin, and its end; None is the file's."""
    self.path, self._stream, self._begin, self._end = path, stream, begin, end
    self.read = self.lines = 0

  def take(self, method: str, most: int) -> bytes:
    """The next bytes; b'' at the end.

    Args:
      method: The stream's method, 'read' or 'readline'.
      most: Number of bytes to take at most; below 0, any number.

    Raises:
      ValueError: The file is damaged.
    """
    if self._end is not None:
      bytes_left = self._end - self._begin - self.read
      # A line is not cut by the end of its span, which is the end of a line.
      most = min(most, bytes_left)
    try:
      block = getattr(self._stream, method)(most) if most else b''
    except file_formats.DAMAGED as error:
      raise InputError(
        f'{self.path} is damaged after line {self.line() - 1}: {error}'
      ) from None
    self.read += len(block)
    return block

  def line(self) -> int:
    """Number of the line after those that are counted, from 1."""
    with self.path.open('rb') as file:
      blocks = iter(lambda: file.read(2**20), b'')
      lines_before, bytes_left = 0, self._begin
      for block in blocks if bytes_left else ():
        lines_before += block[:bytes_left].count(b'\n')
        bytes_left -= len(block)
        if bytes_left <= 0:
          break
    return lines_before + self.lines + 1


def continuation_length(raw: bytes) -> int:
  """Number of first bytes that continue a character begun before them."""
  count = 0
  while count < min(3, len(raw)) and raw[count] & 0xC0 == 0x80:
    count += 1
  return count


def decoded(
  raw: bytes, path: pathlib.Path | str, line: Callable[[], int]
) -> str:
  """The text of UTF-8; `line` gives the number of the first line."""
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    number = line() + raw.count(b'\n', 0, error.start)
    where = f' in line {number}' if path else ''
    raise InputError(f'{path} is not UTF-8{where}: {error}') from None
