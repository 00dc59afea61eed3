"""Text files of a user, given by a pattern."""

import dataclasses
import glob
import hashlib
import os
import pathlib

from moe_jax.data.sources.contract import (
  SPLITS,
  Selection,
  SourceOptions,
  Texts,
)
from moe_jax.data.store import Digest
from moe_jax.options import NOT_EMPTY, option


@dataclasses.dataclass(frozen=True)
class FilesSource(SourceOptions):
  """UTF-8 text files, each a document."""

  pattern: str = option(
    dataclasses.MISSING,
    "Path of the text files, with '*' for any name and '**' for folders of any "
    'depth.',
    NOT_EMPTY,
  )

  def texts(self, selection: Selection = Selection()) -> Texts:
    """The documents, in order of path; each file is read when it is needed.

    Of a single file, the first 90 % of the characters are for training, the
    rest for validation. Of several files, about one in ten is for validation,
    by a hash of its name.

    Raises:
      ValueError: No file matches, or a split is neither of our two.
    """
    selection.check_splits('files')
    paths = matching(self.pattern)
    parts = _file_splits(paths, os.path.expanduser(self.pattern))
    digest = Digest()
    for split in SPLITS:
      digest.split(split)
      for path in parts[split]:
        digest.text(path.read_bytes())

    def documents(split):
      own = selection.own(split)
      for path in parts[own]:
        text = _read_text(path)
        if len(paths) == 1:
          cut = int(len(text) * 0.9)
          text = text[:cut] if own == 'train' else text[cut:]
        yield text

    return Texts(
      f'files:{os.path.expanduser(self.pattern)} ({len(paths)} found)',
      f'{digest.hexdigest()} {len(paths) == 1} {selection.splits}',
      documents,
    )


def matching(pattern: str) -> list[pathlib.Path]:
  """The files that match a pattern, sorted; '~' is the home folder.

  Raises:
    ValueError: No file matches.
  """
  pattern = os.path.expanduser(pattern)
  names = sorted(glob.glob(pattern, recursive=True))
  paths = [pathlib.Path(name) for name in names if os.path.isfile(name)]
  if not paths:
    raise ValueError(f'no file matches {pattern!r} in {os.getcwd()}')
  return paths


def _file_splits(
  paths: list[pathlib.Path], pattern: str
) -> dict[str, list[pathlib.Path]]:
  """About one path in ten is for validation, at least one for each split."""
  if len(paths) == 1:
    return {'train': paths, 'validation': paths}
  # Names are relative to the pattern's fixed part, so that files keep their
  # split when the folder is moved.
  fixed = pathlib.Path(pattern.split('*')[0].split('?')[0].split('[')[0])
  base = fixed if pattern.startswith(f'{fixed}{os.sep}') else fixed.parent

  def rank(path):
    name = os.path.relpath(path, base).replace(os.sep, '/')
    return hashlib.sha256(name.encode()).digest()

  # The lowest rank is always held out and the highest never, so no split is
  # empty.
  lowest, *others = sorted(paths, key=rank)
  highest = others[-1]
  held_out = {p for p in others if p != highest and rank(p)[0] < 256 // 10}
  held_out.add(lowest)
  return {
    'train': [p for p in paths if p not in held_out],
    'validation': [p for p in paths if p in held_out],
  }


def _read_text(path: pathlib.Path) -> str:
  try:
    return path.read_bytes().decode()
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8: {error}') from error
