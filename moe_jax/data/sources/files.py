"""Documents in a user's files, whose paths match a pattern."""

import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from upath import UPath

from moe_jax.config import option
from moe_jax.data import cache_folders, document_files, urls
from moe_jax.data.contracts import (
  SPLITS,
  Pieces,
  Selection,
  SourceOptions,
  Texts,
)
from moe_jax.data.document_files import is_text
from moe_jax.data.sources.python_stdlib import split_of
from moe_jax.data.urls import Path, matching, stamp_of
from moe_jax.errors import InputError

# Number of bytes of files in a piece, which one process tokenizes at a time.
PIECE_BYTES = 2**25
# Rules in place of a split, for a part whose documents are in both splits.
_BY_HASH, _LAST_TENTH = 'by hash', 'last tenth'
_FORMAT = 2  # how documents are cut and split, a part of the identity


@dataclasses.dataclass(frozen=True)
class FilesSource(SourceOptions):
  """Documents in files of text, JSON lines or parquet, told apart by name.

  The pattern may be a URL that fsspec reads, such as 'gs://bucket/*.jsonl.gz'.
  """

  pattern: str = option(
    dataclasses.MISSING,
    "Path or URL of the files, with '*' for any name and '**' for folders of "
    'any depth. Names that end in .jsonl or .ndjson are JSON lines, .parquet '
    'is parquet, all others are text; .gz, .bz2, .xz or .zst may follow.',
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
    stamps = {path: stamp_of(path) for path in paths}
    memory = hashlib.sha256(os.path.abspath(pattern).encode()).hexdigest()[:32]
    memory_file = selection.cache / 'digests' / f'{memory}.json'
    local = [path for path in paths if isinstance(path, pathlib.Path)]
    digests: dict[Path, str] = {
      **{path: str(stamps[path]) for path in paths},  # of files at a URL
      **cache_folders.sha256s(local, memory_file),
    }
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
    split: 'train', 'validation', or a rule by which its documents are in both:
      `_BY_HASH` or `_LAST_TENTH`.
    stamp: The file's `stamp_of` before the source's identity was taken, by
      which a later change of the file is noticed.
  """

  span: document_files.Span
  split: str
  stamp: list


class FilePieces(Pieces):
  """The documents of parts of files, in pieces of about `PIECE_BYTES` bytes."""

  def __init__(self, parts: Iterable[Part], field: str, selection: Selection):
    """Groups parts into pieces; `field` is the key or column with the text."""
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

  def read(self, number: int) -> Iterator[tuple[str, tuple[str]]]:
    for part in self._pieces[number]:
      for split, text in self._documents(part, SPLITS):
        yield split, (text,)

  def documents(self, split: str) -> Iterator[str]:
    """The documents of 'train' or of 'validation', of all pieces."""
    for part in itertools.chain.from_iterable(self._pieces):
      for _, text in self._documents(part, [split]):
        yield text

  def _documents(
    self, part: Part, splits: Sequence[str]
  ) -> Iterator[tuple[str, str]]:
    """The documents of a part that are in `splits`, each with its split."""
    names = [(self._selection.name_of(split), split) for split in splits]
    if part.split in SPLITS and part.split not in dict(names):
      return
    _check_stamp(part)
    for text in document_files.read(part.span, self._field):
      named = [(part.split, text)]
      if part.split == _BY_HASH:
        named = [(split_of(text), text)]
      elif part.split == _LAST_TENTH:
        cut = int(len(text) * 0.9)
        named = zip(SPLITS, (text[:cut], text[cut:]))
      for own_name, document in named:
        for name, split in names:
          if name == own_name:
            yield split, document
    _check_stamp(part)


def _check_stamp(part: Part) -> None:
  if stamp_of(part.span.path) != part.stamp:
    raise InputError(f'{part.span.path} was changed while it was read; restart')


def _parts(
  splits: Mapping[Path, str], stamps: Mapping[Path, list]
) -> Iterator[Part]:
  """The parts of all files with their splits, in the order of `stamps`.

  `splits` has the split of each file, or the rule for its documents; `stamps`
  has what `stamp_of` gives for each file, its size first.
  """
  for path, stamp in stamps.items():
    split, cut = splits[path], stamp[0] * 9 // 10
    extra_cuts = [cut] if split == _LAST_TENTH else []
    for span in document_files.spans(path, PIECE_BYTES, extra_cuts):
      part_split = split
      if split == _LAST_TENTH and not span.whole:
        part_split = 'train' if span.begin < cut else 'validation'
      yield Part(span, part_split, stamp)


def _file_splits(paths: Sequence[Path], pattern: str) -> dict[Path, str]:
  """Each file's split, or the rule, such as `_BY_HASH`, for its documents.

  Several files of text are split by their names after the fixed beginning of
  `pattern`, which all paths match.
  """
  if not all(map(is_text, paths)):
    return dict.fromkeys(paths, _BY_HASH)
  if len(paths) == 1:
    compressed = document_files.is_compressed(paths[0])
    return {paths[0]: _BY_HASH if compressed else _LAST_TENTH}
  # Names are relative to the pattern's fixed part, so that files keep their
  # split when the folder is moved.
  pattern = urls.without_protocol(pattern)
  fixed = pathlib.Path(pattern.split('*')[0].split('?')[0].split('[')[0])
  base = fixed if pattern.startswith(f'{fixed}{os.sep}') else fixed.parent

  def rank(path):
    name = path.path if isinstance(path, UPath) else path
    name = os.path.relpath(name, base).replace(os.sep, '/')
    return hashlib.sha256(name.encode()).digest()

  # The lowest rank is always held out and the highest never, so no split is
  # empty.
  lowest, *others, _ = sorted(paths, key=rank)
  held_out = {lowest, *(p for p in others if rank(p)[0] < 256 // 10)}
  return {p: 'validation' if p in held_out else 'train' for p in paths}
