"""Reads documents from files of plain text, JSON lines or parquet.

    for span in spans(path):
      for text in read(span): ...

The name of a file says how it is read: `.jsonl` and `.ndjson` are JSON lines,
`.parquet` is parquet, and everything else is text in UTF-8. Text and lines may
be compressed: `.gz`, `.bz2`, `.xz`, `.zst`. Each line of JSON and each row of
parquet holds a document. A file of text of up to `WHOLE_BYTES` bytes that is
not compressed is one document; longer and compressed text is cut at an empty
line or an end of line into documents of 64 KiB to 1 MiB. Parquet and `.zst`
need pyarrow, which `pip install moe_jax[data]` brings.
"""

import bz2
import dataclasses
import functools
import gzip
import io
import itertools
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from upath import UPath

from moe_jax.config import option
from moe_jax.data.plain_files import decoded, encoded, first_line, parse_json
from moe_jax.data.urls import Path
from moe_jax.errors import InputError, from_extra

# Largest size in bytes of an uncompressed text file that is one document.
WHOLE_BYTES = 2**24
# Longer text is cut at the first empty line after `LEAST_BYTES` bytes, or at
# the first end of a line after twice as many, or anywhere at `MOST_BYTES`.
LEAST_BYTES = 2**16
MOST_BYTES = 2**20
# A longer line of JSON is refused, as it would have to be held in memory.
MOST_LINE_BYTES = 2**28
PARQUET = '.parquet'
_LINES = ('.jsonl', '.ndjson')
_EMPTY_LINE = re.compile(rb'\n[ \t\r]*\n')
_BLOCK = 2**20
_ROWS = 64  # rows of a parquet file that are in memory at once
# Errors of libraries where a compressed stream is damaged or ends early.
DAMAGED = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)
# The option of sources that read lines of JSON by `json_lines`.
PATTERN_OPTION: Any = option(
  dataclasses.MISSING,
  "Path of the files with a JSON object in each line, with '*' for any name "
  "and '**' for folders of any depth; .gz, .bz2, .xz or .zst may follow.",
  required=True,
)


class Span(NamedTuple):
  """A part of a file that is read independently of the other parts.

  Attributes:
    path: The file.
    begin: First byte, or first row group of a parquet file. A line or document
      belongs to the span in which it begins.
    end: The byte or row group after the last.
    size: Number of bytes of the file that this part takes.
    whole: Whether the part is a single document.
  """

  path: Path
  begin: int
  end: int
  size: int
  whole: bool = False


@dataclasses.dataclass
class PartBytes:
  """The bytes of a part of a file.

  Attributes:
    path: The file.
    stream: The uncompressed bytes; its position is the first byte of the part
      that is not taken yet.
    begin: Offset in the file of the part's first byte.
    left: Upper bound on the number of bytes of the part that are not taken yet.
    lines: Number of lines that the caller has taken; the caller counts them.
  """

  path: Path
  stream: io.BufferedIOBase
  begin: int = 0
  left: int = sys.maxsize
  lines: int = 0

  def take(self, method: str, most: int) -> bytes:
    """Takes the next bytes of the part; b'' at its end.

    Args:
      method: The stream's method, 'read' or 'readline'.
      most: Number of bytes to take at most; below 0, any number.

    Raises:
      ValueError: The file is damaged.
    """
    # The part ends where a line ends, so that this limit cuts no line.
    most = min(most, self.left)
    try:
      block = getattr(self.stream, method)(most) if most else b''
    except DAMAGED as error:
      raise InputError(
        f'{self.path} is damaged after line {self.line() - 1}: {error}'
      ) from None
    self.left -= len(block)
    return block

  def line(self) -> int:
    """The next line's number in the file, from 1, by the count `lines`."""
    with self.path.open('rb') as file:
      lines_before = 0
      while block := file.read(min(_BLOCK, self.begin - file.tell())):
        lines_before += block.count(b'\n')
    return lines_before + self.lines + 1

  def where(self) -> str:
    """The path and the number of the next line, as messages name it."""
    return f'{self.path}, line {self.line()}'


def is_text(path: Path) -> bool:
  """Whether a file is plain text by its name, not JSON lines or parquet."""
  return _suffix(path) not in (*_LINES, PARQUET)


def is_compressed(path: Path) -> bool:
  """Whether the name of a file says that it is compressed as a whole."""
  return path.suffix.lower() in CODECS


def spans(
  path: Path, most: int = 0, extra_cuts: Iterable[int] = ()
) -> list[Span]:
  """The parts of a file that can be read independently, in order.

  A compressed file is one part, as it can be read only from its beginning.

  Args:
    path: The file.
    most: Number of bytes of a part; 0 makes one part. Row groups of parquet
      are not cut.
    extra_cuts: More offsets, in bytes, at which a part of text or of JSON lines
      begins.
  """
  size = path.stat().st_size
  if is_compressed(path):
    return [Span(path, 0, size, size)]
  if _suffix(path) == PARQUET:
    return list(_parquet_spans(path, most or size))
  if is_text(path) and size <= WHOLE_BYTES:
    return [Span(path, 0, size, size, whole=True)]
  cuts = sorted({*range(0, size, most or size or 1), *extra_cuts, size})
  return [Span(path, b, e, e - b) for b, e in itertools.pairwise(cuts)]


def read(span: Span, field: str = 'text') -> Iterator[str]:
  """The documents of a part of a file, in order.

  Args:
    span: The part.
    field: Key of a JSON line, or column of a parquet file, with the text.

  Raises:
    ValueError: The file is damaged, or a document is no text; the message
      names file and line or row.
  """
  path, begin, end = span[:3]
  if _suffix(path) == PARQUET:
    yield from _parquet_texts(path, begin, end, field)
  elif span.whole:
    yield decoded(path.read_bytes(), path, lambda: 1)
  else:
    with path.open('rb') as raw:
      source = PartBytes(path, _opened(raw, path))
      if not is_compressed(path):
        begin, end = (_boundary(raw, at, span) for at in (begin, end))
        source.begin, source.left = begin, end - begin
        raw.seek(begin)
      if is_text(path):
        yield from _cut_text(source)
      else:
        text_of = functools.partial(_text_of, field=field)
        yield from (text for _, text in _values(source, text_of))


def _boundary(raw: BinaryIO, offset: int, span: Span) -> int:
  """The offset of the first line that begins at byte `offset` or later.

  In a plain text that has no end of line within `MOST_BYTES` from there, it is
  instead the offset of the first character that begins at `offset` or later.

  Args:
    raw: The bytes of the file.
    offset: The offset from which a line is looked for.
    span: A part of the file, whose name says whether it is text or JSON lines.

  Raises:
    ValueError: In JSON lines, `MOST_LINE_BYTES` follow with no end of line.
  """
  if not offset:
    return 0
  raw.seek(offset - 1)
  text = is_text(span.path)
  most = MOST_BYTES if text else MOST_LINE_BYTES
  line_rest = raw.readline(most + 1)
  if line_rest.endswith(b'\n') or len(line_rest) <= most:
    return offset - 1 + len(line_rest)
  if not text:
    raise InputError(_too_long(f'{span.path}, the line at byte {offset}'))
  return offset + _continuation_length(line_rest[1:])


def _too_long(where: str) -> str:
  return f'{where} has more than {MOST_LINE_BYTES} bytes, which is no document'


def _cut_text(source: PartBytes) -> Iterator[str]:
  """Cuts plain text into documents of `LEAST_BYTES` or more, but for the last.

  A document ends after the first empty line that lies between `LEAST_BYTES` and
  twice as many bytes from the document's beginning. Without such a line, it
  ends with the first line that ends beyond twice `LEAST_BYTES`. If that line is
  too long, the document ends where a character ends at `MOST_BYTES`.
  """
  buffer, at, more = b'', 0, True
  while True:
    while more and len(buffer) - at < MOST_BYTES + 4:
      block = source.take('read', MOST_BYTES)
      buffer, at, more = buffer[at:] + block, 0, bool(block)
    if at == len(buffer):
      return
    cut = _cut(buffer, at)
    document = buffer[at:cut]
    yield decoded(document, source.path, source.line)
    source.lines += document.count(b'\n')
    at = cut


def _cut(buffer: bytes, at: int) -> int:
  """The index in `buffer` at which the document that begins at `at` ends."""
  most = at + MOST_BYTES
  empty = _EMPTY_LINE.search(buffer, at + LEAST_BYTES, at + 2 * LEAST_BYTES)
  if empty:
    return empty.end()
  line = buffer.find(b'\n', at + 2 * LEAST_BYTES, most)
  if line >= 0:
    return line + 1
  if len(buffer) <= most:
    return len(buffer)
  return most + _continuation_length(buffer[most : most + 4])


def _values(
  source: PartBytes, read: Callable[[Any], Any] = lambda value: value
) -> Iterator[tuple[bytes, Any]]:
  """Yields each line of JSON that is not blank: its stripped bytes, its value.

  Args:
    source: The lines.
    read: Function from a line's value to what is yielded in its place. File and
      line are put before the message of an InputError that the function raises.
  """
  while line := source.take('readline', MOST_LINE_BYTES + 1):
    if len(line) > MOST_LINE_BYTES:
      raise InputError(_too_long(source.where()))
    if content := line.strip():
      try:
        value = read(parse_json(decoded(line, ''), ''))
      except InputError as error:
        raise InputError(f'{source.where()}{error}') from None
      yield content, value
    source.lines += 1


def _text_of(value: Any, field: str) -> str:
  """The text that an object has under the key `field`; it may be empty.

  Raises:
    ValueError: The value is no such object. The caller puts the file and the
      number of the value's line before the message.
  """
  if not isinstance(value, dict):
    kind = type(value).__name__
    raise InputError(
      f' is no object with a text under the key {field!r}, but a {kind}'
    )
  if field not in value:
    keys = ', '.join(map(repr, sorted(value)))
    raise InputError(
      f' has no key {field!r}; its keys: {keys}; choose data.source.files.field'
    )
  encoded(value[field], f': {field}')
  return value[field]


def json_lines(paths: Sequence[Path]) -> Iterator[tuple[str, bytes, Any]]:
  """Yields ('PATH, line 3', stripped bytes, value) of lines that are not blank.

  Raises:
    ValueError: A file is damaged, or a line is no JSON in UTF-8.
  """
  for path in paths:
    with path.open('rb') as raw:
      source = PartBytes(path, _opened(raw, path))
      for content, value in _values(source):
        yield f'{path}, line {source.lines + 1}', content, value


def _suffix(path: Path) -> str:
  """The suffix that says what a file holds: '.jsonl' of 'a.jsonl.gz'."""
  inner = path.with_suffix('') if is_compressed(path) else path
  return inner.suffix.lower()


def _continuation_length(raw: bytes) -> int:
  """How many of the first 3 bytes continue a character begun before `raw`.

  A cut so many bytes later splits no character of UTF-8.
  """
  count = 0
  while count < min(3, len(raw)) and raw[count] & 0xC0 == 0x80:
    count += 1
  return count


def _zst(raw: BinaryIO) -> io.IOBase:
  arrow = from_extra('pyarrow', 'data', '.zst files')
  return arrow.CompressedInputStream(arrow.PythonFile(raw, 'r'), 'zstd')


# Functions that decompress a stream, by the suffix of its file.
CODECS = {
  '.gz': lambda raw: gzip.GzipFile(fileobj=raw),
  '.bz2': bz2.BZ2File,
  '.xz': lzma.LZMAFile,
  '.zst': _zst,
}


def _opened(raw: Any, path: Path) -> io.BufferedIOBase:
  """The bytes of an open file, decompressed if `path` ends as in `CODECS`."""
  if not is_compressed(path):
    return raw
  return io.BufferedReader(CODECS[path.suffix.lower()](raw), _BLOCK)


def _parquet_spans(path: Path, most: int) -> Iterator[Span]:
  """Yields spans of consecutive row groups of a parquet file, in order.

  A span ends with the row group by which it reaches `most` bytes.

  Raises:
    ValueError: The file is no parquet file, or pyarrow is not installed.
  """
  metadata = _parquet(path).metadata
  begin = size = 0
  for number in range(metadata.num_row_groups):
    group = metadata.row_group(number)
    columns = range(group.num_columns)
    size += sum(group.column(i).total_compressed_size for i in columns)
    if size >= most or number + 1 == metadata.num_row_groups:
      yield Span(path, begin, number + 1, size)
      begin, size = number + 1, 0


def _parquet_texts(
  path: Path, begin: int, end: int, column: str
) -> Iterator[str]:
  """Yields the texts of a column in the row groups `begin` to `end` - 1.

  Raises:
    ValueError: The file is damaged, there is no such column of texts, or a row
      has no text. The message names the row, from 1.
  """
  file = _parquet(path)
  schema = file.schema_arrow
  if column not in schema.names:
    names = sorted(schema.names)
    raise InputError(f'{path} has no column {column!r}; it has {names}')
  kind = str(schema.field(column).type)
  if 'string' not in kind or ('<' in kind and 'dictionary' not in kind):
    raise InputError(f'column {column!r} of {path} holds {kind}, no texts')
  count = sum(file.metadata.row_group(i).num_rows for i in range(begin))
  try:
    for batch in file.iter_batches(
      _ROWS, row_groups=range(begin, end), columns=[column], use_threads=False
    ):
      for text in batch.column(0).to_pylist():
        count += 1
        if text is None:
          raise InputError(f'{path}, row {count} has no text in {column!r}')
        yield text
  except InputError:
    raise
  except (OSError, ValueError) as error:
    reason = first_line(error)
    raise InputError(f'{path} is damaged after row {count}: {reason}') from None


def _parquet(path: Path):
  parquet = from_extra('pyarrow.parquet', 'data', 'parquet files')
  try:
    file = path.open('rb') if isinstance(path, UPath) else path
    # With `buffer_size` only a block of a column is read at a time; without it,
    # the whole column is.
    return parquet.ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False)
  except (OSError, ValueError) as error:
    reason = first_line(error)
    raise InputError(f'{path} is no parquet file: {reason}') from None
