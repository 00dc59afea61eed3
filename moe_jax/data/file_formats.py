"""Compressed streams and parquet files, read a block or a few rows at a time.

Parquet and `.zst` need pyarrow, which `pip install moe_jax[data]` brings.
"""

import bz2
import gzip
import importlib
import io
import lzma
import pathlib
import types
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from moe_jax.data.plain_files import first_line
from moe_jax.errors import InputError

PARQUET = '.parquet'
_BLOCK = 2**20
_ROWS = 64  # rows of a parquet file that are in memory at once
# Errors of libraries where a compressed stream is damaged or ends early.
DAMAGED = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)


def _zst(raw: BinaryIO) -> io.IOBase:
  arrow = _library('pyarrow', '.zst files')
  return arrow.CompressedInputStream(arrow.PythonFile(raw, 'r'), 'zstd')


# Functions that decompress a stream, by the suffix of its file.
CODECS = {
  '.gz': lambda raw: gzip.GzipFile(fileobj=raw),
  '.bz2': bz2.BZ2File,
  '.xz': lzma.LZMAFile,
  '.zst': _zst,
}


def opened(raw: BinaryIO, path: pathlib.Path) -> io.BufferedReader:
  """The decompressed stream of an open file.

  Raises:
    ValueError: The library for its suffix is not installed.
  """
  return io.BufferedReader(CODECS[path.suffix.lower()](raw), _BLOCK)


def parquet_groups(path: pathlib.Path, most: int) -> list[tuple[int, int, int]]:
  """Begin and end of stretches of row groups, and their bytes in the file.

  Args:
    path: The file.
    most: Number of bytes at which a stretch ends.

  Raises:
    ValueError: The file is no parquet file, or pyarrow is not installed.
  """
  metadata = _parquet(path).metadata
  stretches, begin, size = [], 0, 0
  for number in range(metadata.num_row_groups):
    group = metadata.row_group(number)
    columns = range(group.num_columns)
    size += sum(group.column(i).total_compressed_size for i in columns)
    if size >= most or number + 1 == metadata.num_row_groups:
      stretches.append((begin, number + 1, size))
      begin, size = number + 1, 0
  return stretches


def parquet_texts(
  path: pathlib.Path, begin: int, end: int, column: str
) -> Iterator[tuple[str, float]]:
  """The texts of a column, each with the share of the rows that are read.

  Args:
    path: The file.
    begin: First row group.
    end: End of the row groups.
    column: Name of the column.

  Raises:
    ValueError: The file is damaged, there is no such column of texts, or a row
      has none. The message names the row, from 1.
  """
  file = _parquet(path)
  _check_column(file.schema_arrow, path, column)
  sizes = [file.metadata.row_group(i).num_rows for i in range(end)]
  skipped, total, count = sum(sizes[:begin]), sum(sizes[begin:]), 0
  try:
    for batch in file.iter_batches(
      _ROWS, row_groups=range(begin, end), columns=[column], use_threads=False
    ):
      for text in batch.column(0).to_pylist():
        count += 1
        if text is None:
          raise _NoTextError
        yield text, count / total
  except _NoTextError:
    raise InputError(
      f'{path}, row {skipped + count} has no text in column {column!r}'
    ) from None
  except (OSError, ValueError) as error:
    raise InputError(
      f'{path} is damaged after row {skipped + count}: {first_line(error)}'
    ) from None


class _NoTextError(Exception):
  """A row has no value in the column of texts."""


def _check_column(schema, path: pathlib.Path, column: str) -> None:
  if column not in schema.names:
    raise InputError(
      f'{path} has no column {column!r}; it has {sorted(schema.names)}'
    )
  kind = str(schema.field(column).type)
  if 'string' not in kind or ('<' in kind and 'dictionary' not in kind):
    raise InputError(f'column {column!r} of {path} holds {kind}, no texts')


def _parquet(path: pathlib.Path):
  parquet = _library('pyarrow.parquet', 'parquet files')
  try:
    # The buffer is read ahead of a column; without it, the whole column is.
    return parquet.ParquetFile(path, buffer_size=_BLOCK, pre_buffer=False)
  except (OSError, ValueError) as error:
    reason = first_line(error)
    raise InputError(f'{path} is no parquet file: {reason}') from None


def _library(name: str, file_kind: str) -> types.ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError:
    raise InputError(
      f'{file_kind} are read by pyarrow, which is not installed: pip install '
      "'moe_jax[data]', or pip install pyarrow"
    ) from None
