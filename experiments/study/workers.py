"""A function of many items, one process a core, in which all may be stopped.

SIGTERM reaches every process, whose runs save; none outlives its parent. Not
here: what is run (`scheduled_runs.py`).
"""

import concurrent.futures
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from moe_jax import command_line, host

_CACHE = (
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
)
_WATCH_SECONDS = 0.5
_STOPPED = 'stopped by SIGTERM; the same command goes on'
_stopping = None  # of a worker: an event, set once no other item is to begin


def usual() -> int:
  """Items at a time: one a core of a CPU, one on accelerators."""
  return len(_cores()) if jax.default_backend() == 'cpu' else 1


def over(
  function: Callable[[Any], Any], items: Sequence[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
  """Each item with the function's result, as they end; close it at the end.

  What the function compiles is shared.

  Args:
    function: Of a module; it may raise SystemExit where it was stopped.
    items: What it is called with; picklable, as the function.
    workers: How many at a time; 1: in this process.

  Raises:
    SystemExit: SIGTERM came.
  """
  with tempfile.TemporaryDirectory() as cache:
    if workers == 1:
      yield from _here(function, items, cache)
    else:
      yield from _in_processes(function, items, workers, cache)


def _here(function, items, cache: str):
  before = {name: getattr(jax.config, name) for name in _CACHE}
  _share_compiled(cache)
  try:
    for item in items:
      yield item, function(item)
  except SystemExit:
    print(_STOPPED, flush=True)
    raise
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def _in_processes(function, items, workers: int, cache: str):
  context = multiprocessing.get_context('spawn')
  number, stopping = context.Value('i', 0), context.Event()
  start = number, stopping, os.getpid(), cache, _cores()
  with concurrent.futures.ProcessPoolExecutor(
    workers, context, _begin, start
  ) as pool:
    futures = {pool.submit(_unless, function, item): item for item in items}
    before = signal.signal(signal.SIGTERM, _stop)
    try:
      for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result()
    except BaseException:
      # Those that run save; of the rest some may be queued in a worker.
      stopping.set()
      for process in multiprocessing.active_children():
        process.terminate()
      pool.shutdown(cancel_futures=True)
      raise
    finally:
      signal.signal(signal.SIGTERM, before)


def _cores() -> list[int]:
  """Those that this process may use; macOS does not say which."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def _stop(number, frame) -> None:
  """Of SIGTERM: as main, it ends with a status that says to start again."""
  del number, frame
  print(_STOPPED, flush=True)
  raise SystemExit(command_line.STOPPED)


def _unless(function, item) -> Any:
  if _stopping.is_set():
    raise SystemExit('all were stopped')
  return function(item)


def _begin(
  number, stopping, parent: int, cache: str, cores: Sequence[int]
) -> None:
  """A worker's start: a core of its own, and no life beyond its parent's."""
  global _stopping
  _stopping = stopping
  with number.get_lock():
    own = cores[number.value % len(cores)]
    number.value += 1
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {own})
  host.keep_freed_memory()
  _share_compiled(cache)

  def watch():
    while os.getppid() == parent:
      time.sleep(_WATCH_SECONDS)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _share_compiled(cache: str) -> None:
  for name, value in zip(_CACHE, (cache, 0.2), strict=True):
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # one that is open stays where it was
