"""Processes tokenize the pieces of a source, which are joined in one folder.

Every finished piece has a folder of its own. The folder's name and its list of
digests say that the piece is whole, so that work which was killed goes on with
the pieces that are missing. What is written does not depend on how many
processes or hosts write it.
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data import store
from moe_jax.data.cache_folders import locked, new_folder, publish, sha256
from moe_jax.data.plain_files import parse_json, read_text
from moe_jax.data.sources.contract import SPLITS, Pieces
from moe_jax.data.store import Digest, DocumentWriter
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError

FACTS = 'piece.json'
# Threads of the tokenizers library would take cores from the other processes.
_ONE_THREAD = {'TOKENIZERS_PARALLELISM': 'false', 'RAYON_NUM_THREADS': '1'}
_POLL_SECONDS = 0.2
_REPORT_BYTES = 2**18  # bytes after which a worker reports its progress
_WORKER: dict[str, Callable[[int], None]] = {}  # called by a worker process


class Work(NamedTuple):
  """What a host tokenizes, and the folder for it; it can be pickled.

  Attributes:
    folder: Folder of finished pieces.
    pieces: The documents, in pieces.
    tokenizer: The tokenizer.
  """

  folder: pathlib.Path
  pieces: Pieces
  tokenizer: Tokenizer

  def path(self, number: int) -> pathlib.Path:
    """The folder of the finished piece with the index `number`."""
    return self.folder / f'{number:05}'


def piece_facts(
  work: Work, number: int, *, digests: bool = True
) -> dict[str, Any] | None:
  """The record of a finished piece; None if the piece is missing or not whole.

  The record has, under `splits`, the counts and the sha256 of the texts of each
  split and, under `files`, the size and sha256 of each file. Sizes are checked
  always; with `digests` the files are read to check their sha256.
  """
  folder = work.path(number)
  try:
    facts = parse_json(read_text(folder / FACTS), folder / FACTS)
    paths = [path for path in folder.iterdir() if path.name != FACTS]
    sizes = {path.name: path.stat().st_size for path in paths}
    whole = sizes == {name: fact[0] for name, fact in facts['files'].items()}
    whole = whole and (not digests or facts['files'] == _file_facts(folder))
  except (AttributeError, LookupError, OSError, TypeError, ValueError):
    return None
  return facts if whole else None


def write_piece(work: Work, number: int, report: Callable[[int], None]) -> None:
  """Tokenizes a piece, unless another process has finished it by then.

  An existing piece that is not whole is removed. `report` is called with the
  number of bytes that were read since the last call.

  Raises:
    ValueError: The source is damaged, or the tokenizer lacks a character.
  """
  with locked(work.path(number)):
    existed = work.path(number).exists()
    if piece_facts(work, number) is not None:
      report(work.pieces.sizes[number])
      return
    if existed:  # not a piece that is finished since, where no lock is
      shutil.rmtree(work.path(number), ignore_errors=True)
    with new_folder(work.folder, f'{number:05}') as unfinished:
      _write_files(unfinished, work, number, report)
      try:
        unfinished.rename(work.path(number))
      except OSError:  # another host was faster, where there are no locks
        if not (work.path(number) / FACTS).exists():
          raise


def _write_files(folder, work, number, report) -> None:
  digests = {split: Digest() for split in SPLITS}
  with contextlib.ExitStack() as stack:
    writers = {}
    for split, digest in digests.items():
      writer = DocumentWriter(folder / split, work.tokenizer, digest)
      writers[split] = stack.enter_context(writer)
    reported = 0
    for split, text, bytes_read in work.pieces.read(number):
      writers[split].write(text)
      if bytes_read - reported >= _REPORT_BYTES:
        report(bytes_read - reported)
        reported = bytes_read
    splits = {
      split: {**writer.counts(), 'sha256': digests[split].hexdigest()}
      for split, writer in writers.items()
    }
  facts = {'splits': splits, 'files': _file_facts(folder)}
  (folder / FACTS).write_text(json.dumps(facts), encoding='utf-8')
  report(work.pieces.sizes[number] - reported)


def _file_facts(folder: pathlib.Path) -> dict[str, list]:
  """The size and sha256 of each file of a piece, without the piece's record."""
  return {
    path.name: [path.stat().st_size, sha256(path)]
    for path in sorted(folder.iterdir())
    if path.name != FACTS
  }


def write_pieces(
  work: Work,
  numbers: Sequence[int],
  processes: int,
  report: Callable[[int], None],
) -> int:
  """Tokenizes pieces in several processes, or in this one if `processes` is 1.

  `report` is called with the number of bytes that were read since the last
  call.

  Returns:
    The most bytes of memory that one process held, as far as the system says.

  Raises:
    ValueError: As `write_piece`, or a process was killed.
  """
  if processes == 1 or len(numbers) < 2:
    for number in numbers:
      write_piece(work, number, report)
    return peak_memory()
  context = multiprocessing.get_context('spawn')
  bytes_read, reported, peak = context.Value('q', 0), 0, 0
  pool = futures.ProcessPoolExecutor(
    min(processes, len(numbers)), context, _begin_worker, (work, bytes_read)
  )
  try:
    running = {pool.submit(_work, number) for number in numbers}
    while running:
      done, running = futures.wait(
        running, _POLL_SECONDS, futures.FIRST_EXCEPTION
      )
      read_by_now = bytes_read.value
      report(read_by_now - reported)
      reported = read_by_now
      peak = max([peak, *(job.result() for job in done)])
  except futures.BrokenExecutor:
    raise InputError(
      'a process was killed while it tokenized, maybe for lack of memory: take '
      'fewer processes. Finished pieces are kept: the same command goes on'
    ) from None
  finally:
    pool.shutdown(cancel_futures=True)  # pieces in work are finished
  return peak


def _begin_worker(work: Work, bytes_read: Any) -> None:
  """Prepares a worker process, which ends with its parent, to tokenize."""
  os.environ |= _ONE_THREAD
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, without a text
  threading.Thread(target=_end_with_parent, daemon=True).start()

  def report(count: int) -> None:
    with bytes_read.get_lock():
      bytes_read.value += count

  _WORKER['write'] = functools.partial(write_piece, work, report=report)


def _work(number: int) -> int:
  """Tokenizes a piece; returns the most memory that this process has held.

  A defect of a user's class is sent to the parent as text: an error that cannot
  be sent would end the pool, as a kill does.
  """
  try:
    _WORKER['write'](number)
  except (InputError, MemoryError, OSError):
    raise
  except Exception:
    raise RuntimeError(traceback.format_exc()) from None
  return peak_memory()


def _end_with_parent() -> None:
  """Ends this process when its parent has ended, in whatever way."""
  if (parent := multiprocessing.parent_process()) is not None:
    parent.join()
  os._exit(1)


def peak_memory() -> int:
  """The most bytes of memory this process has held; 0 where it is unknown."""
  status = pathlib.Path('/proc/self/status')
  if not status.exists():
    return 0
  peak = re.search(r'^VmHWM:\s+(\d+) kB$', status.read_text(), re.MULTILINE)
  return int(peak[1]) * 1024 if peak else 0


def join(work: Work, folder: pathlib.Path) -> tuple[int, ...]:
  """Joins the pieces into `folder`, unless it exists or a piece is missing.

  Returns:
    The indices of missing pieces; if there are any, `folder` is not made yet.

  Raises:
    ValueError: A piece was damaged, or a split has less than two tokens.
  """
  count = len(work.pieces.sizes)
  missing = [i for i in range(count) if not work.path(i).is_dir()]
  if missing:
    return tuple(missing)
  with locked(work.folder / 'whole'):
    if not folder.is_dir():
      facts = []
      for number in range(count):
        fact = piece_facts(work, number, digests=False)
        if fact is None:
          shutil.rmtree(work.path(number))
          raise InputError(
            f'{work.path(number)} was damaged and is removed; the same command '
            'makes it anew'
          )
        facts.append(fact)
      with new_folder(work.folder, 'whole') as unfinished:
        token_files = _join(work, unfinished, facts)
        publish(unfinished, folder, token_files)
  return ()


def _join(
  work: Work, unfinished: pathlib.Path, facts: list[dict[str, Any]]
) -> dict[str, list]:
  """Fills one folder from all pieces: token files are linked, starts joined.

  Returns:
    The size and sha256 of each token file, by name.
  """
  token_files, shards, splits, digest = {}, {}, {}, hashlib.sha256()
  for split in SPLITS:
    counts = [fact['splits'][split] for fact in facts]
    keys = 'documents', 'bytes', 'tokens'
    splits[split] = {key: sum(piece[key] for piece in counts) for key in keys}
    store.check_tokens(split, splits[split])
    shards[split] = [piece['tokens'] for piece in counts]
    for number, piece_counts in enumerate(counts):
      digest.update(f'{split} {number} {piece_counts["sha256"]}\n'.encode())
      if piece_counts['tokens']:
        path = store.shard_path(unfinished, split, number)
        link(work.path(number) / f'{split}.tokens', path)
        token_files[path.name] = facts[number]['files'][f'{split}.tokens']
    with (unfinished / f'{split}.starts').open('wb') as out:
      tokens_before = 0
      for number, count in enumerate(shards[split]):
        starts = np.fromfile(work.path(number) / f'{split}.starts', np.int64)
        out.write((starts + tokens_before).tobytes())
        tokens_before += count
  about = {'dtype': store.dtype_of(work.tokenizer), 'splits': splits}
  store.finish(unfinished, {**about, 'shards': shards}, digest, work.tokenizer)
  return token_files


def link(source: pathlib.Path, target: pathlib.Path) -> None:
  """Gives a file a second name, or a copy where there are no links."""
  try:
    target.hardlink_to(source)
  except OSError:
    shutil.copyfile(source, target)
