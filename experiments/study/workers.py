"""Worker processes that call Python functions, as places of the scheduler.

A worker makes many calls, so that programs compiled in one serve the next. No
worker outlives its parent.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from experiments.study.scheduler import DONE, FAILED, STOPPED
from moe_jax import cli
from moe_jax.devices import keep_freed_memory

_CACHE = (
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
)
_WATCH_SECONDS = 0.5
_SPAWN = multiprocessing.get_context('spawn')


def usual() -> int:
  """Default number of workers: one for each core of a CPU, else one."""
  return len(_cores()) if jax.default_backend() == 'cpu' else 1


@contextlib.contextmanager
def places(workers: int) -> Iterator[Sequence['Worker | ThisProcess']]:
  """Starts a number of workers that share a cache of compiled programs.

  With one worker, functions are called in this process.
  """
  with tempfile.TemporaryDirectory() as cache:
    if workers == 1:
      with _sharing_compiled(cache):
        yield [ThisProcess()]
      return
    cores = _cores()
    pool = [Worker(cache, cores[i % len(cores)]) for i in range(workers)]
    try:
      yield pool
    finally:
      for worker in pool:
        worker.close()


class Call:
  """A call that has begun, a task of the scheduler.

  Attributes:
    error: Traceback of a call that failed; set by `outcome`.
  """

  error = ''

  def ended(self) -> bool:
    """Whether the call has ended."""
    raise NotImplementedError

  def outcome(self) -> str:
    """`DONE`, `FAILED` or `STOPPED`, once the call has ended."""
    raise NotImplementedError

  def signal(self, number: int) -> None:
    """Sends the signal to every process of the call."""


class ThisProcess:
  """This process as a place: functions are called at once, in it."""

  def call(self, function: Callable[..., Any], *args: Any) -> Call:
    """Calls the function and waits for it to return."""
    outcome, error = _outcome(function, args)
    if outcome == STOPPED:
      # The function received the signal instead of the scheduler: repeat it.
      signal.raise_signal(signal.SIGTERM)
    return _Returned(outcome, error)


class _Returned(Call):
  def __init__(self, outcome: str, error: str):
    self._outcome, self.error = outcome, error

  def ended(self) -> bool:
    return True

  def outcome(self) -> str:
    return self._outcome


class Worker:
  """A process as a place: it calls functions, one after the other."""

  def __init__(self, cache: str, core: int):
    self._args = cache, core, os.getpid()
    self._process: Any = None

  def call(self, function: Callable[..., Any], *args: Any) -> Call:
    """Begins a call in the process.

    The function must be that of a module, and arguments must be picklable.
    """
    if self._process is None or not self._process.is_alive():
      self._connection, worker_end = _SPAWN.Pipe()
      self._process = _SPAWN.Process(
        target=_serve, args=(worker_end, *self._args)
      )
      self._process.start()
      worker_end.close()
    self._connection.send((function, args))
    return _Called(self._process, self._connection)

  def close(self) -> None:
    """Ends the process after its present call."""
    if self._process is None:
      return
    with contextlib.suppress(OSError):
      self._connection.send(None)
    self._process.join()


class _Called(Call):
  def __init__(self, process: Any, connection: Connection):
    self._process, self._connection = process, connection

  def ended(self) -> bool:
    return self._connection.poll() or not self._process.is_alive()

  def outcome(self) -> str:
    with contextlib.suppress(EOFError, OSError):
      if self._connection.poll():
        outcome, self.error = self._connection.recv()
        return outcome
    self._process.join()
    self.error = f'the process ended with status {self._process.exitcode}'
    return FAILED

  def signal(self, number: int) -> None:
    if self._process.is_alive():
      os.kill(self._process.pid, number)


def _outcome(function, args) -> tuple[str, str]:
  """Calls the function; returns the outcome and a traceback if it failed."""
  try:
    function(*args)
  except SystemExit as error:
    if error.code == cli.STOPPED:
      return STOPPED, ''
    return FAILED, traceback.format_exc()
  except Exception:
    return FAILED, traceback.format_exc()
  return DONE, ''


def _serve(connection: Connection, cache: str, core: int, parent: int) -> None:
  """Main function of a worker, which serves calls until its parent ends.

  Args:
    connection: Connection to the parent.
    cache: Folder of the shared cache of compiled programs.
    core: Core of the CPU that the worker runs on.
    parent: Process id of the parent.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent asks it to stop
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {core})
  keep_freed_memory()
  _share_compiled(cache)

  def watch():
    while os.getppid() == parent:
      time.sleep(_WATCH_SECONDS)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
  with contextlib.suppress(EOFError, ConnectionResetError):
    while (task := connection.recv()) is not None:
      connection.send(_outcome(*task))
  # Libraries' threads can crash an interpreter that shuts down normally.
  os._exit(0)


def _cores() -> list[int]:
  """Numbers of the cores that this process may use; on macOS all cores."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def _sharing_compiled(cache: str) -> Iterator[None]:
  before = {name: getattr(jax.config, name) for name in _CACHE}
  _share_compiled(cache)
  try:
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def _share_compiled(cache: str) -> None:
  for name, value in zip(_CACHE, (cache, 0.2), strict=True):
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # an open cache would keep its old folder
