"""Documents in files: plain text, JSON lines and parquet, one at a time.

    for text in documents(path): ...

The name of a file says how it is read: `.jsonl` and `.ndjson` are JSON lines,
`.parquet` is parquet, and everything else is text in UTF-8. Text and lines may
be compressed: `.gz`, `.bz2`, `.xz`, `.zst`. Documents are the texts of lines
and rows; a file of text of up to `WHOLE_BYTES` bytes that is not compressed is
a document; longer and compressed text is cut (see `_cut_text`).
"""

import io
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from moe_jax.data import file_formats
from moe_jax.data.file_bytes import PartBytes, continuation_length, decoded
from moe_jax.data.plain_files import parse_json
from moe_jax.errors import InputError

# Bytes of a file up to which text is one document, if it is not compressed.
WHOLE_BYTES = 2**24
# Longer text is cut at the first empty line after so many bytes; without one
# before twice as many, at the next end of a line; at `MOST_BYTES` anywhere.
LEAST_BYTES = 2**16
MOST_BYTES = 2**20
# A longer line of JSON is refused, as it would have to be held in memory.
MOST_LINE_BYTES = 2**28
_LINES = ('.jsonl', '.ndjson')
_EMPTY_LINE = re.compile(rb'\n[ \t\r]*\n')


class Span(NamedTuple):
  """A part of a file that is read by itself.

  Attributes:
    path: The file.
    begin: First byte, or first row group of a parquet file. A line or document
      belongs to the span in which it begins.
    end: End of the bytes or row groups.
    size: Number of bytes of the file that this part takes.
    whole: Whether the part is a document.
  """

  path: pathlib.Path
  begin: int
  end: int
  size: int
  whole: bool = False


class Document(NamedTuple):
  """A document, and how many bytes of its span have been read after it."""

  text: str
  read: int


def documents(path: pathlib.Path, field: str = 'text') -> Iterator[str]:
  """The documents of a file, in order.

  Args:
    path: The file.
    field: Key of a JSON line, or column of a parquet file, with the text.

  Raises:
    ValueError: The file is damaged, or a document is no text; the message
      names file and line or row.
  """
  for span in spans(path):
    for document in read(span, field):
      yield document.text


def is_text(path: pathlib.Path) -> bool:
  """Whether a file is text by its name, compressed or not."""
  return _suffix(path) not in (*_LINES, file_formats.PARQUET)


def is_compressed(path: pathlib.Path) -> bool:
  """Whether a file is compressed as a whole by its name."""
  return path.suffix.lower() in file_formats.CODECS


def spans(
  path: pathlib.Path, most: int = 0, extra_cuts: Iterable[int] = ()
) -> list[Span]:
  """The parts of a file that can be read apart, in order.

  A compressed file is one part, as it can be read from its begin alone.

  Args:
    path: The file.
    most: Number of bytes of a part; 0 makes one part. Row groups of parquet
      are not cut.
    extra_cuts: More bytes of text or of lines at which a part begins.
  """
  size = path.stat().st_size
  if is_compressed(path):
    return [Span(path, 0, size, size)]
  if _suffix(path) == file_formats.PARQUET:
    groups = file_formats.parquet_groups(path, most or size)
    return [Span(path, *group) for group in groups]
  if is_text(path) and size <= WHOLE_BYTES:
    return [Span(path, 0, size, size, whole=True)]
  cuts = sorted({*range(0, size, most or size or 1), *extra_cuts, size})
  return [Span(path, b, e, e - b) for b, e in itertools.pairwise(cuts)]


def read(span: Span, field: str = 'text') -> Iterator[Document]:
  """The documents of a part of a file; see `documents`."""
  if _suffix(span.path) == file_formats.PARQUET:
    rows = file_formats.parquet_texts(span.path, span.begin, span.end, field)
    for text, share in rows:
      yield Document(text, int(span.size * share))
  elif span.whole:
    raw = span.path.read_bytes()
    yield Document(decoded(raw, span.path, lambda: 1), len(raw))
  else:
    with span.path.open('rb') as raw:
      yield from _of_bytes(raw, span, field)


def _of_bytes(raw: BinaryIO, span: Span, field: str) -> Iterator[Document]:
  """The documents of text or lines."""
  path, begin, end = span.path, span.begin, None
  if is_compressed(path):
    stream = cast(io.BufferedIOBase, file_formats.opened(raw, path))
  else:
    begin, end = (_boundary(raw, at, span) for at in (span.begin, span.end))
    raw.seek(begin)
    stream = cast(io.BufferedIOBase, raw)
  source = PartBytes(path, stream, begin, end)
  texts = _cut_text(source) if is_text(path) else _json_texts(source, field)
  for text in texts:
    # The bytes that were read of a compressed file count, not its text.
    yield Document(text, raw.tell() - begin if end is None else source.read)


def _boundary(raw: BinaryIO, offset: int, span: Span) -> int:
  """The offset at which the first line begins at or after a byte.

  In text without an end of line for `MOST_BYTES`, a character begins there.
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
  return offset + continuation_length(line_rest[1:])


def _too_long(where: str) -> str:
  return f'{where} has more than {MOST_LINE_BYTES} bytes, which is no document'


def _cut_text(source: PartBytes) -> Iterator[str]:
  """Documents of at least `LEAST_BYTES`; the last may be shorter.

  A document ends after the first empty line beyond `LEAST_BYTES`, or after the
  first line beyond twice as many, or where a character ends at `MOST_BYTES`.
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
  """The end of the document that begins at `at`."""
  most = at + MOST_BYTES
  empty = _EMPTY_LINE.search(buffer, at + LEAST_BYTES, at + 2 * LEAST_BYTES)
  if empty:
    return empty.end()
  line = buffer.find(b'\n', at + 2 * LEAST_BYTES, most)
  if line >= 0:
    return line + 1
  if len(buffer) <= most:
    return len(buffer)
  return most + continuation_length(buffer[most : most + 4])


def _json_texts(source: PartBytes, field: str) -> Iterator[str]:
  """The texts of lines of JSON; empty lines are passed over."""
  while line := source.take('readline', MOST_LINE_BYTES + 1):
    if len(line) > MOST_LINE_BYTES:
      raise InputError(_too_long(f'{source.path}, line {source.line()}'))
    if line.strip():
      yield _json_text(line, source, field)
    source.lines += 1


def _json_text(line: bytes, source: PartBytes, field: str) -> str:
  try:
    # The number of the line is counted only for a message.
    value = parse_json(decoded(line, '', source.line), '')
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
      raise InputError(_no_text(value, field))
    value[field].encode()
  except UnicodeEncodeError as error:
    reason = f': {field!r} has a half of a character: {error}'
  except InputError as error:
    reason = str(error)
  else:
    return value[field]
  raise InputError(f'{source.path}, line {source.line()}{reason}')


def _no_text(value: Any, field: str) -> str:
  """The problem of a line whose value has no text under a key."""
  if not isinstance(value, dict):
    kind = type(value).__name__
    return f' is no object with a text under the key {field!r}, but a {kind}'
  if field in value:
    return f': the key {field!r} has no text but {value[field]!r:.80}'
  return (
    f' has no key {field!r}; its keys: {", ".join(map(repr, sorted(value)))}; '
    'choose one with data.source.files.field'
  )


def lines(path: pathlib.Path) -> Iterator[bytes]:
  """The lines of a file, decompressed by its suffix.

  Raises:
    ValueError: The file is damaged.
  """
  with path.open('rb') as raw:
    packed = is_compressed(path)
    stream = file_formats.opened(raw, path) if packed else raw
    source = PartBytes(path, stream, 0, None)
    while line := source.take('readline', -1):
      yield line
      source.lines += 1


def _suffix(path: pathlib.Path) -> str:
  """The suffix that says what the file holds, without that of compression."""
  inner = path.with_suffix('') if is_compressed(path) else path
  return inner.suffix.lower()
