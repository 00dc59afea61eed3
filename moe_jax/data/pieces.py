"""Tokenizes a source once, in pieces, by a pool of processes or Apache Beam.

A piece holds the tokens of a part of the source's texts. `make_piece` is a pure
function of the index of a piece: it writes a folder, always with the same
bytes, renames it when it is whole, and leaves a piece that exists as it is. So
any process may make any piece, in any order and repeatedly, and work that was
killed goes on where it ended. `make` has all pieces made and joins them. A run
calls `make` when it starts, and so does the command of `prepare.py`, with more
processes.
"""

import hashlib
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

from moe_jax.data import store
from moe_jax.data.cache_folders import FORMAT, prepared, verify
from moe_jax.data.contracts import SPLITS, Pairs, Pieces, Selection, Texts
from moe_jax.data.tokenizers import Fitted, Tokenizer, TokenizerOptions, load
from moe_jax.errors import InputError, from_extra

POOL = 'pool'  # runner of a pool of processes
# Threads of the tokenizers library would take cores from the other processes.
_ONE_THREAD = {'TOKENIZERS_PARALLELISM': 'false', 'RAYON_NUM_THREADS': '1'}
_WORKER: dict[str, 'Work'] = {}  # what a worker process tokenizes


class Work(NamedTuple):
  """The texts to tokenize and the folder for their tokens; can be pickled.

  Attributes:
    folder: Folder of finished pieces.
    pieces: The texts to tokenize, in pieces.
    streams: Names of the streams of tokens, DOCUMENTS or PAIRS of `contracts`.
    tokenizer: The tokenizer.
    url: URL of a folder of the same pieces. Pieces that exist at the URL are
      copied from there, and others are made and copied to the URL; '' stands
      for no URL.
  """

  folder: pathlib.Path
  pieces: Pieces
  streams: tuple[str, ...]
  tokenizer: Tokenizer
  url: str = ''

  def path(self, number: int) -> pathlib.Path:
    """The folder of the piece with this index."""
    return self.folder / f'{number:05}'


class Engine(NamedTuple):
  """The processes, or the runner of Apache Beam, that make the pieces.

  Attributes:
    processes: Number of processes of the pool; 1 stands for this process alone.
    runner: POOL, or the name of a runner of Apache Beam.
    arguments: Beam's own flags, such as '--region=europe-west1'.
    on_progress: Function that is called with the name of a source, the number
      of its bytes that are tokenized by now, and the number of all its bytes.
  """

  processes: int = 1
  runner: str = POOL
  arguments: tuple[str, ...] = ()
  on_progress: Callable[[str, int, int], None] = lambda name, done, total: None


def make_piece(work: Work, number: int) -> None:
  """Writes the tokens of piece `number`, unless they exist and are whole.

  Raises:
    ValueError: The source is damaged, or the tokenizer lacks a character.
  """
  path = work.path(number)

  def write(folder: pathlib.Path) -> None:
    texts = work.pieces.read(number)
    store.write_piece(folder, texts, work.tokenizer, work.streams)

  if not _is_whole(path):
    prepared(path, write, url=work.url and f'{work.url}/{path.name}')


def _is_whole(path: pathlib.Path) -> bool:
  """Whether a piece exists as it was written; a damaged piece is removed."""
  try:
    verify(path, digests=True)
  except InputError:
    shutil.rmtree(path, ignore_errors=True)
  return path.is_dir()


def make(
  corpus: Texts | Pairs,
  tokenizer: TokenizerOptions,
  selection: Selection,
  engine: Engine = Engine(),
) -> pathlib.Path:
  """The folder of a source's tokens, verified or, if missing, made by `engine`.

  Raises:
    ValueError: The data is missing or bad, a process was killed, or the folder
      is damaged.
    NotPreparedError: The folder is missing within `reading_only`.
  """
  folder = _folder_of(corpus, tokenizer, selection)
  parts = folder.with_name(f'{folder.name}.parts')
  url = selection.url('tokens', folder.name)

  def write(unfinished: pathlib.Path) -> None:
    tokenizer_url = url and f'{url}/tokenizer'
    fitted = fit(tokenizer, [corpus], parts / 'tokenizer', tokenizer_url)
    work = Work(parts, corpus.in_pieces(), corpus.streams, fitted, url)
    sizes = work.pieces.sizes
    todo = [i for i in range(len(sizes)) if not _is_whole(work.path(i))]
    done = sum(sizes) - sum(sizes[number] for number in todo)
    engine.on_progress(corpus.name, done, sum(sizes))
    run = run_pool if engine.runner == POOL or len(todo) < 2 else run_beam
    for number in run(work, todo, engine):
      done += sizes[number]
      engine.on_progress(corpus.name, done, sum(sizes))
    pieces = [work.path(number) for number in range(len(sizes))]
    try:
      store.join(pieces, unfinished, fitted, corpus.streams)
    except InputError:  # a split is empty, and nobody needs the pieces
      shutil.rmtree(parts)
      raise

  try:
    prepared(folder, write, digests=selection.cache_digests)
  except OSError:
    # On a file system without locks another process may have joined the pieces.
    if not folder.is_dir():
      raise
  shutil.rmtree(parts, ignore_errors=True)
  return folder


def fit(
  options: TokenizerOptions,
  corpora: Sequence[Texts | Pairs],
  folder: pathlib.Path,
  url: str,
) -> Tokenizer:
  """The tokenizer of `options`, fitted to all texts of all corpora.

  The tokenizer is kept in `folder`, and at `url` if that is not ''. If it was
  fitted before, it is read from `folder` or from `url`.
  """

  def write(unfinished: pathlib.Path) -> None:
    texts = (t for c in corpora for split in SPLITS for t in c.texts(split))
    options.fit(texts).save(unfinished / 'tokenizer.json')

  return load(prepared(folder, write, url=url) / 'tokenizer.json')


def _folder_of(
  corpus: Texts | Pairs, tokenizer: TokenizerOptions, selection: Selection
) -> pathlib.Path:
  """The folder where a source's tokens are, or will be.

  The folder's name is a hash of the identities of texts and tokenizer. Options
  of the class `Fitted` hold a tokenizer that exists and replaces other options.
  If the folder of those other options has tokens of an equal tokenizer, that
  folder is returned.
  """

  def folder_for(options: TokenizerOptions) -> pathlib.Path:
    key = f'{FORMAT} {corpus.identity} {options.identity()}'
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return selection.cache / 'tokens' / name

  folder = folder_for(tokenizer)
  if folder.is_dir() or not isinstance(tokenizer, Fitted):
    return folder
  try:
    other = folder_for(tokenizer.replaced) if tokenizer.replaced else folder
    equal = load(other / 'tokenizer.json').identity == tokenizer.identity()
  except (InputError, OSError):  # the replaced file or its tokens are missing
    return folder
  return other if equal else folder


def run_pool(work: Work, numbers: list[int], engine: Engine) -> Iterator[int]:
  """Tokenizes the pieces with the indices `numbers` in a pool of processes.

  With one process, or fewer than two pieces, this process makes the pieces
  itself.

  Yields:
    The index of each piece when it is finished.

  Raises:
    ValueError: A piece cannot be made, or a process was killed, maybe for lack
      of memory.
  """
  if engine.processes == 1 or len(numbers) < 2:
    for number in numbers:
      make_piece(work, number)
      yield number
    return
  context = multiprocessing.get_context('spawn')
  pool = futures.ProcessPoolExecutor(
    min(engine.processes, len(numbers)), context, _begin_worker, (work,)
  )
  try:
    jobs = {pool.submit(_work, number): number for number in numbers}
    for job in futures.as_completed(jobs):
      job.result()
      yield jobs[job]
  except futures.BrokenExecutor:
    raise InputError(
      'a process was killed while it tokenized, maybe for lack of memory: take '
      'fewer processes. Finished pieces are kept: the same command goes on'
    ) from None
  finally:
    pool.shutdown(cancel_futures=True)  # pieces in work are finished


def _begin_worker(work: Work) -> None:
  """Prepares a worker process, which ends with its parent, to tokenize."""
  os.environ |= _ONE_THREAD
  # Ctrl-C ends the worker process without a message.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _WORKER['work'] = work


def _work(number: int) -> None:
  """Tokenizes the piece with the index `number` in a worker process.

  An error in a user's class is sent to the parent process as text: an error
  that cannot be pickled would end the pool, as the death of a worker does.
  """
  try:
    make_piece(_WORKER['work'], number)
  except (InputError, MemoryError, OSError):
    raise
  except Exception:
    raise RuntimeError(traceback.format_exc()) from None


def _end_with_parent() -> None:
  """Ends this process when its parent process has ended, in whatever way."""
  if (parent := multiprocessing.parent_process()) is not None:
    parent.join()
  os._exit(1)


def run_beam(work: Work, numbers: list[int], engine: Engine) -> Iterator[int]:
  """Tokenizes the pieces with the indices `numbers` by a runner of Apache Beam.

  Yields:
    The index of each piece when it is on this machine.

  Raises:
    ValueError: Beam is not installed, or its machines have written pieces to
      folders of their own.
  """
  runner = f'--runner={engine.runner}'
  beam, options = (
    from_extra(f'apache_beam{module}', 'beam', runner)
    for module in ('', '.options.pipeline_options')
  )
  flags = options.PipelineOptions([runner, *engine.arguments])
  with beam.Pipeline(options=flags) as pipeline:
    indices = pipeline | beam.Create(numbers) | beam.Reshuffle()
    _ = indices | beam.Map(lambda number: make_piece(work, number))
  for number in numbers:
    if not work.url and not work.path(number).is_dir():
      raise InputError(
        f'{work.path(number)} is not here, as {engine.runner} writes on '
        'other machines: set data.cache_dir to a folder at a URL'
      )
    make_piece(work, number)  # copies it from the URL
    yield number
