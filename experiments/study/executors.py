"""Executors of a study's runs: all that have `submit(function, *arguments)`.

What `submit` returns has `done`, `result` and `cancel`. Runs go to processes of
this machine, to a SLURM cluster by the package submitit, or to a Ray cluster
that is up; a package is imported only when it is named.
"""

import atexit
import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax

from moe_jax.devices import keep_programs

EXECUTORS = ('pool', 'submitit', 'ray')
# Minutes after which submitit stops a run, unless `timeout_min` is given.
_MINUTES = 24 * 60
_WATCH_SECONDS = 0.5
_SPAWN = multiprocessing.get_context('spawn')
_Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Where:
  """A place where runs are made: a pool of processes, SLURM or Ray.

  Attributes:
    executor: One of `EXECUTORS`.
    workers: Number of runs at a time; 0 takes one for each core of a CPU, or
      one on accelerators, and on clusters all of them. The runs of a pool of
      one are made in this process.
    resources: What a run needs of a cluster: parameters of submitit, such as
      `slurm_partition`, or options of a Ray task, such as `num_gpus`.
  """

  executor: str = 'pool'
  workers: int = 0
  resources: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def opened(
  where: Where, num_calls: int, folder: pathlib.Path
) -> Iterator[tuple[Any, int]]:
  """Opens an executor; yields it, with the number of calls at a time.

  Args:
    where: Where runs are made.
    num_calls: Number of calls that will be submitted.
    folder: Folder for the files of submitit.
  """
  workers = where.workers
  if where.executor == 'submitit':
    submitit = importlib.import_module('submitit')
    executor = submitit.AutoExecutor(folder=folder)
    executor.update_parameters(**{'timeout_min': _MINUTES, **where.resources})
  elif where.executor == 'ray':
    executor = _Ray(where.resources)
  else:
    workers = min(workers or _usual(), num_calls)
    executor = _Pool(workers) if workers > 1 else _ThisProcess()
  try:
    yield executor, min(workers or num_calls, num_calls)
  finally:
    if isinstance(executor, _Pool):
      executor.close()


def _usual() -> int:
  """Default number of workers: one for each core of a CPU, else one."""
  return len(_cores()) if jax.default_backend() == 'cpu' else 1


def _cores() -> list[int]:
  """Numbers of the cores that this process may use; on macOS all cores."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


class _ThisProcess:
  """Calls functions in this process, and waits for them."""

  def submit(self, function: _Function, *arguments: Any) -> futures.Future:
    """Calls a function that returns None where SIGTERM stopped it."""
    future = futures.Future()
    try:
      future.set_result(function(*arguments))
    except (Exception, SystemExit) as error:
      future.set_exception(error)
    else:
      if future.result() is None:  # it caught the signal, which is repeated
        signal.raise_signal(signal.SIGTERM)
    return future


class _Pool:
  """Processes of this machine, each with a core of its own.

  Each is a pool of one, which makes many calls, so that programs compiled in
  one serve the next. A process that is lost takes its call with it, no other,
  and has a successor.
  """

  def __init__(self, workers: int):
    self._pools = [self._pool(number) for number in range(workers)]
    self._calls: list[futures.Future | None] = [None] * workers

  def _pool(self, number: int) -> futures.ProcessPoolExecutor:
    arguments = _cores()[number % len(_cores())], os.getpid()
    return futures.ProcessPoolExecutor(1, _SPAWN, _begin, arguments)

  def submit(self, function: _Function, *arguments: Any) -> futures.Future:
    """Calls a function in a process that is free; there has to be one."""
    number = [call is None or call.done() for call in self._calls].index(True)
    try:
      call = self._pools[number].submit(function, *arguments)
    except BrokenProcessPool:
      self._pools[number] = self._pool(number)
      call = self._pools[number].submit(function, *arguments)
    self._calls[number] = call
    return call

  def close(self) -> None:
    """Ends the processes after their present calls."""
    for pool in self._pools:
      pool.shutdown()


def _begin(core: int, parent: int) -> None:
  """Begins a process of the pool, which does not outlive its parent.

  Args:
    core: Core of the CPU that the process runs on.
    parent: Process id of the parent.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent asks it to stop
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {core})
  keep_programs()

  def watch():
    while os.getppid() == parent:
      time.sleep(_WATCH_SECONDS)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
  # Libraries' threads can crash an interpreter that shuts down normally.
  atexit.register(os._exit, 0)


class _Ray:
  """A Ray cluster that is up, as `ray start --head` starts one.

  A call that is cancelled goes on until this process ends, and Ray ends it.
  """

  def __init__(self, options: Mapping[str, Any]):
    ray = importlib.import_module('ray')
    if not ray.is_initialized():
      ray.init(address='auto')
    self._remote = ray.remote(**{'max_retries': 0, **options})

  def submit(self, function: _Function, *arguments: Any) -> futures.Future:
    """Calls a function on the cluster."""
    return self._remote(function).remote(*arguments).future()
