"""Text files of a user, given by a pattern."""

import dataclasses
import glob
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from moe_jax.config import option
from moe_jax.data import cache_folders, document_files
from moe_jax.data.document_files import is_text
from moe_jax.data.sources.contract import (
  SPLITS,
  Located,
  Pieces,
  Selection,
  SourceOptions,
  Texts,
)
from moe_jax.data.sources.python_stdlib import split_of
from moe_jax.devices import cache_root
from moe_jax.errors import InputError

# Bytes of files in a piece, which one process tokenizes at a time.
PIECE_BYTES = 2**25
# Rules in place of a split, for a part whose documents are in both splits.
_BY_HASH, _LAST_TENTH = 'by hash', 'last tenth'
_FORMAT = 2  # how documents are cut and split, a part of the identity


@dataclasses.dataclass(frozen=True)
class FilesSource(SourceOptions):
  """Files of text, JSON lines or parquet; see `document_files`."""

  pattern: str = option(
    dataclasses.MISSING,
    "Path of the files, with '*' for any name and '**' for folders of any "
    'depth. Names that end in .jsonl or .ndjson are JSON lines, .parquet is '
    'parquet, all others are text; .gz, .bz2, .xz or .zst may follow.',
    required=True,
  )
  field: str = option(
    'text',
    "Key of a JSON line, or column of a parquet file, with a document's text; "
    'files of text have none.',
    required=True,
  )

  def texts(self, selection: Selection = Selection()) -> Texts:
    """The documents, in order of path.

    A single file of text has its first 90 % for training, the rest for
    validation: by characters if it is one document, else by bytes, at the end
    of a line. Among several files of text, about one in ten is for validation,
    by a hash of its name. In everything else (JSON lines, parquet, a single
    compressed file, a mixture of these and text), about one document in 20 is
    for validation, by a hash of its text.

    Raises:
      ValueError: No file matches, a split is neither 'train' nor 'validation',
        or a file is no parquet file.
    """
    selection.check_splits('files')
    pattern = os.path.expanduser(self.pattern)
    paths = matching(self.pattern)
    # Sizes and times are taken first, so that a change of a file while others
    # are read is noticed.
    stamps = {path: cache_folders.stamp_of(path) for path in paths}
    memory = hashlib.sha256(os.path.abspath(pattern).encode()).hexdigest()[:32]
    folder = cache_root(selection.cache_dir) / 'digests'
    digests = cache_folders.sha256s(paths, folder / f'{memory}.json')
    splits = _file_splits(paths, pattern)
    pieces = FilePieces(_parts(splits, stamps), self.field, selection)
    files = [
      (splits[p], is_text(p), document_files.is_compressed(p), digests[p])
      for p in paths
    ]
    field = '' if all(map(is_text, paths)) else self.field
    return Texts(
      f'files:{pattern} ({len(paths)} found)',
      f'files {_FORMAT} {PIECE_BYTES} {files} {field!r} {selection.splits}',
      pieces.documents,
      pieces if len(pieces.sizes) > 1 else None,
    )


class Part(NamedTuple):
  """A part of a file, its split, and the file's size and times.

  Attributes:
    span: The part.
    split: 'train' or 'validation', or the rule that splits its documents.
    stamp: The file's `stamp_of` before the source's identity was taken, by
      which a later change of the file is noticed.
  """

  span: document_files.Span
  split: str
  stamp: list[int]


class FilePieces(Pieces):
  """Parts of files, in pieces of about `PIECE_BYTES`."""

  def __init__(self, parts: Iterable[Part], field: str, selection: Selection):
    """Groups the parts, in order."""
    self._field, self._selection = field, selection
    self._pieces: list[list[Part]] = [[]]
    sizes = [0]
    for part in parts:
      if self._pieces[-1] and sizes[-1] + part.span.size > PIECE_BYTES:
        self._pieces.append([])
        sizes.append(0)
      self._pieces[-1].append(part)
      sizes[-1] += part.span.size
    self.sizes = tuple(sizes)

  def read(self, number: int) -> Iterator[Located]:
    """The documents of all parts of a piece, in order."""
    bytes_before = 0
    for part in self._pieces[number]:
      for name, text, bytes_read in self._documents(part, SPLITS):
        for split in SPLITS:
          if self._selection.name_of(split) == name:
            yield Located(split, text, bytes_before + bytes_read)
      bytes_before += part.span.size

  def documents(self, split: str) -> Iterator[str]:
    """The documents of 'train' or of 'validation', of all pieces."""
    name = self._selection.name_of(split)
    for part in itertools.chain.from_iterable(self._pieces):
      for _, text, _ in self._documents(part, (name,)):
        yield text

  def _documents(self, part: Part, splits: Sequence[str]) -> Iterator[Located]:
    """The documents of a part that are in `splits`, the source's own names."""
    if part.split in SPLITS and part.split not in splits:
      return
    _check_stamp(part)
    for text, bytes_read in document_files.read(part.span, self._field):
      if part.split == _LAST_TENTH:
        cut = int(len(text) * 0.9)
        texts = {'train': text[:cut], 'validation': text[cut:]}
      else:
        by_hash = part.split == _BY_HASH
        texts = {split_of(text) if by_hash else part.split: text}
      for split, split_text in texts.items():
        if split in splits:
          yield Located(split, split_text, bytes_read)
    _check_stamp(part)


def _check_stamp(part: Part) -> None:
  if cache_folders.stamp_of(part.span.path) != part.stamp:
    raise InputError(
      f'{part.span.path} was changed while it was read; start again'
    )


def matching(pattern: str) -> list[pathlib.Path]:
  """The files that match a pattern, each once, sorted; '~' is the home folder.

  Raises:
    ValueError: No file matches.
  """
  pattern = os.path.expanduser(pattern)
  # Where a pattern fits a path in several ways, glob finds it several times.
  names = sorted(set(glob.glob(pattern, recursive=True)))
  paths = [pathlib.Path(name) for name in names if os.path.isfile(name)]
  if not paths:
    raise InputError(f'no file matches {pattern!r} in {os.getcwd()}')
  return paths


def _parts(
  splits: Mapping[pathlib.Path, str], stamps: Mapping[pathlib.Path, list[int]]
) -> Iterator[Part]:
  """The parts of all files with their splits, in the order of `stamps`."""
  for path, stamp in stamps.items():
    split, cut = splits[path], stamp[0] * 9 // 10
    extra_cuts = [cut] if split == _LAST_TENTH else []
    for span in document_files.spans(path, PIECE_BYTES, extra_cuts):
      part_split = split
      if split == _LAST_TENTH and not span.whole:
        part_split = 'train' if span.begin < cut else 'validation'
      yield Part(span, part_split, stamp)


def _file_splits(
  paths: list[pathlib.Path], pattern: str
) -> dict[pathlib.Path, str]:
  """The split of each file, or the rule that splits its documents."""
  if not all(map(is_text, paths)):
    return dict.fromkeys(paths, _BY_HASH)
  if len(paths) == 1:
    compressed = document_files.is_compressed(paths[0])
    return {paths[0]: _BY_HASH if compressed else _LAST_TENTH}
  # Names are relative to the pattern's fixed part, so that files keep their
  # split when the folder is moved.
  fixed = pathlib.Path(pattern.split('*')[0].split('?')[0].split('[')[0])
  base = fixed if pattern.startswith(f'{fixed}{os.sep}') else fixed.parent

  def rank(path):
    name = os.path.relpath(path, base).replace(os.sep, '/')
    return hashlib.sha256(name.encode()).digest()

  # The lowest rank is always held out and the highest never, so no split is
  # empty.
  lowest, *higher = sorted(paths, key=rank)
  highest = higher[-1]
  held_out = {p for p in higher if p != highest and rank(p)[0] < 256 // 10}
  held_out.add(lowest)
  return {p: 'validation' if p in held_out else 'train' for p in paths}
