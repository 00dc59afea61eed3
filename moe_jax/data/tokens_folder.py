"""The folder of the cache with the tokens of a source, made once.

A run makes the folder by one process when it starts; `prepare.py` makes the
same folder by many processes.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

from moe_jax.data import piece_workers
from moe_jax.data.cache_folders import (
  FORMAT,
  check_may_prepare,
  locked,
  prepared,
  verify,
)
from moe_jax.data.piece_workers import Work, piece_facts
from moe_jax.data.sources.contract import (
  SPLITS,
  Pairs,
  Pieces,
  Selection,
  Texts,
)
from moe_jax.data.tokenizers import (
  Fitted,
  Tokenizer,
  TokenizerOptions,
  load,
)
from moe_jax.devices import cache_root
from moe_jax.errors import InputError, writing


class Share(NamedTuple):
  """The part of a source that a host tokenizes, and by how many processes.

  Attributes:
    processes: Number of processes of this host.
    host: Index of this host, from 0; it takes every `num_hosts`th piece.
    num_hosts: Number of hosts that share the folder of the cache.
    on_progress: Called with the number of bytes that are read by now, and with
      the number of all bytes of this host's share.
  """

  processes: int = 1
  host: int = 0
  num_hosts: int = 1
  on_progress: Callable[[int, int], None] = lambda read, total: None


class FolderReport(NamedTuple):
  """The report of `make` on the folder of a source's tokens.

  Attributes:
    folder: The folder of the tokens.
    is_new: Whether this call made pieces; a folder that existed is verified
      instead.
    missing: Indices of pieces that other hosts have yet to make.
    num_existing: Number of pieces that were there already.
    bytes_read: Number of bytes that were read.
    peak_bytes: The most bytes of memory that one process held; 0 if unknown.
  """

  folder: pathlib.Path
  is_new: bool = False
  missing: tuple[int, ...] = ()
  num_existing: int = 0
  bytes_read: int = 0
  peak_bytes: int = 0


def tokens_folder(
  corpus: Texts | Pairs, tokenizer: TokenizerOptions, selection: Selection
) -> pathlib.Path:
  """The folder of a source's tokens, which is made now unless it exists.

  Raises:
    ValueError: The data is missing or bad, or the folder is damaged.
    NotPreparedError: The folder is missing within `reading_only`.
  """
  report = make(corpus, tokenizer, selection, Share())
  if report.missing:
    raise InputError(
      f'{report.folder} could not be made: another process has removed the '
      f'pieces {list(report.missing)}; start again'
    )
  return report.folder


def make(
  corpus: Texts | Pairs,
  tokenizer: TokenizerOptions,
  selection: Selection,
  share: Share,
) -> FolderReport:
  """Makes this host's share of the pieces, and joins all pieces if they exist.

  Raises:
    ValueError: As `tokens_folder`, or a process was killed.
  """
  folder = _folder_of(corpus, tokenizer, selection)

  def fit() -> Tokenizer:
    texts = (text for split in SPLITS for text in corpus.texts(split))
    return tokenizer.fit(texts)

  report = FolderReport(folder)
  pieces = corpus.pieces if isinstance(corpus, Texts) else None
  if pieces is not None and not folder.is_dir():
    check_may_prepare(os.fspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Other processes wait, except hosts that work at the same time.
    alone = share.num_hosts == 1
    with locked(folder) if alone else contextlib.nullcontext():
      if not folder.is_dir():
        report = _make_pieces(folder, pieces, fit, share)
  if not report.is_new:
    prepared(
      folder,
      lambda unfinished: corpus.write(unfinished, fit()),
      digests=selection.cache_digests,
    )
  return report


def _folder_of(
  corpus: Texts | Pairs, tokenizer: TokenizerOptions, selection: Selection
) -> pathlib.Path:
  """The folder where the tokens are, or will be.

  The tokens of a tokenizer that was fitted to the same texts may be in the
  folder of the options by which it was fitted; that folder is then taken.
  """
  root = cache_root(selection.cache_dir) / 'tokens'

  def folder_for(options: TokenizerOptions) -> pathlib.Path:
    key = f'{FORMAT} {corpus.identity} {options.identity()}'
    return root / hashlib.sha256(key.encode()).hexdigest()[:32]

  folder = folder_for(tokenizer)
  if folder.is_dir() or not isinstance(tokenizer, Fitted):
    return folder
  try:
    other = folder_for(tokenizer.replaced) if tokenizer.replaced else folder
    equal = load(other / 'tokenizer.json').identity == tokenizer.identity()
  except (InputError, OSError):  # the replaced file or its tokens are missing
    return folder
  return other if equal else folder


def _make_pieces(
  folder: pathlib.Path,
  pieces: Pieces,
  fit: Callable[[], Tokenizer],
  share: Share,
) -> FolderReport:
  """Makes this host's pieces, and joins all pieces if they exist.

  The report is on the pieces, or on a folder that another process has made.
  """
  piece_dir = folder.with_name(f'{folder.name}.parts')
  piece_dir.mkdir(parents=True, exist_ok=True)
  sizes = pieces.sizes
  numbers = range(share.host, len(sizes), share.num_hosts)
  try:
    tokenizer = _fitted(piece_dir / 'tokenizer.json', fit)
    work = Work(piece_dir, pieces, tokenizer)
    todo = [number for number in numbers if piece_facts(work, number) is None]
    total = sum(sizes[i] for i in numbers)
    skipped = bytes_read = total - sum(sizes[i] for i in todo)

    def on_read(count: int) -> None:
      nonlocal bytes_read
      bytes_read += count
      share.on_progress(bytes_read, total)

    on_read(0)
    peak = piece_workers.write_pieces(work, todo, share.processes, on_read)
    missing = piece_workers.join(work, folder)
    report = FolderReport(
      folder, True, missing, len(numbers) - len(todo), total - skipped, peak
    )
  except (OSError, InputError):  # pieces may be missing, as others joined them
    if not folder.is_dir():
      raise
    report = FolderReport(folder)
  if folder.is_dir():
    verify(folder, digests=False)  # before the pieces are removed
    shutil.rmtree(piece_dir, ignore_errors=True)
    report = report._replace(missing=())
  return report


def _fitted(path: pathlib.Path, fit: Callable[[], Tokenizer]) -> Tokenizer:
  """The tokenizer of all pieces, which the first process fits for all."""
  with locked(path), writing(path):
    if not path.exists():
      unfinished = path.with_name(f'.{path.name}.{os.getpid()}')
      fit().save(unfinished)
      unfinished.replace(path)
  return load(path)
