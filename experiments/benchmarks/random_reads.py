"""Texts of many gigabytes, and processes that read them prepared at random."""

import functools
import json
import multiprocessing
import pathlib
import re
import resource
import time

import numpy as np

from moe_jax import data
from moe_jax.data import SPLITS, PythonStdlibSource, pieces, store
from moe_jax.data.sources.python_stdlib import split_of
from moe_jax.data.tokenizers import Tokenizer


@functools.cache
def _stdlib() -> str:
  texts = PythonStdlibSource().texts()
  return '\n'.join(text for split in SPLITS for text in texts.texts(split))


def document(number: int) -> str:
  """A piece of the standard library's text behind its number."""
  text = _stdlib()
  # Fibonacci hashing: numbers far apart, and no generator for each document.
  draw = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
  begin = (draw >> 20) % len(text)
  return f'{number}\n{text[begin : begin + draw % _LONGEST]}'


def write(folder: pathlib.Path, size: int) -> np.ndarray:
  """Writes documents as lines; returns which are for training, bool [D].

  Args:
    folder: New folder of the files, `000.jsonl` and so on.
    size: Number of bytes of all files together, about.
  """
  folder.mkdir(parents=True)
  training, written, count = [], 0, 0
  while written < size:
    with (folder / f'{count:03}.jsonl').open('w', encoding='utf-8') as out:
      begun = written
      while written < size and written - begun < _FILE_BYTES:
        text = document(len(training))
        written += out.write(json.dumps({'text': text}) + '\n')
        training.append(split_of(text) == 'train')
    count += 1
  return np.array(training)


def read_at_random(
  options: data.DataOptions, training: np.ndarray
) -> list[dict[str, float]]:
  """The measures of two processes that read their rows of a batch at once.

  Args:
    options: The prepared data.
    training: Which documents are for training, [D].

  Returns:
    Numbers of each process by name:
    - rows_per_second: rows of batches, shuffled as in training.
    - checked: number of documents that are those of the source.
    - wrong: number of documents that are not.
    - open_seconds: time to open the prepared data.
  """
  context = multiprocessing.get_context('spawn')
  jobs = [(options, training, p) for p in range(_PROCESSES)]
  with context.Pool(_PROCESSES) as pool:
    return pool.starmap(_read, jobs, chunksize=1)


def _read(options, training, process) -> dict[str, float]:
  begin = time.perf_counter()
  dataset = data.load(options)
  opened = time.perf_counter() - begin
  rows = _BATCH_SIZE // _PROCESSES
  share = np.arange(process * rows, (process + 1) * rows)
  sizes = dict(batch_size=_BATCH_SIZE, seed=0, share=share)
  stream = data.batch_dataset(dataset.splits['train'], **sizes)
  begin = time.perf_counter()
  for i in range(_BATCHES):
    batch = stream[i]
    assert batch['tokens'].shape == (rows, options.seq_len)
  seconds = time.perf_counter() - begin
  wrong = _wrong(options, training, dataset.tokenizer)
  return {
    'rows_per_second': _BATCHES * rows / seconds,
    'checked': _DOCUMENTS - wrong,
    'wrong': wrong,
    'open_seconds': opened,
  }


def peak_memory() -> int:
  """The most bytes of memory that this process or a child of it has held.

  The unit of `ru_maxrss` is that of Linux.
  """
  children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  # A process' own `ru_maxrss` counts the memory of the program that began it.
  status = pathlib.Path('/proc/self/status').read_text()
  peak = re.search(r'^VmHWM:\s+(\d+) kB$', status, re.MULTILINE)
  return max(children, int(peak[1]) * 1024 if peak else 0)


def _wrong(
  options: data.DataOptions, training: np.ndarray, tokenizer: Tokenizer
) -> int:
  """The number of documents, drawn at random, that are not the source's."""
  texts = options.source.texts(options.selection)
  folder = pieces.make(texts, options.tokenizer, options.selection)
  tokens, starts = store.read(folder, 'train', texts.streams)
  numbers = np.flatnonzero(training)
  assert len(numbers) == len(starts), (len(numbers), len(starts))
  ends = np.append(starts[1:], len(tokens))
  wrong = 0
  for index in np.random.default_rng().integers(0, len(starts), _DOCUMENTS):
    ids = tokens[starts[index] : ends[index]]
    expected = tokenizer.encode(document(int(numbers[index])))
    wrong += not np.array_equal(ids, np.append(expected, tokenizer.eos_id))
  return wrong


_PROCESSES = 2
_BATCH_SIZE, _BATCHES = 64, 200  # rows of a batch are shared by the processes
_DOCUMENTS = 2000  # documents that each process compares
_FILE_BYTES = 2**28
_LONGEST = 6000  # largest number of characters of a document
