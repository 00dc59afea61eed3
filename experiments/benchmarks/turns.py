"""Programs of another library, run in a process of their own in turn.

In one process its threads and those of XLA disturb each other. The process
runs a program when it is asked to, and sleeps between.
"""

import functools
import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

Runs = Mapping[Any, Callable[[], Any]]
PAUSE = 'pause'


@contextmanager
def turns(programs: Callable[[], Runs]) -> Iterator[Runs]:
  """The programs as functions that run them in the other process.

  The last function is a pause, as the threads of PyTorch wait for their next
  work on the processors: let no other case follow the programs at once.

  Args:
    programs: A function that can be pickled, and that the other process calls
      for the programs by name.
  """
  context = multiprocessing.get_context('spawn')
  parent_end, child_end = context.Pipe()
  process = context.Process(
    target=_serve, args=(child_end, programs), daemon=True
  )
  process.start()
  child_end.close()

  def run(name):
    parent_end.send(name)
    parent_end.recv()

  try:
    names = parent_end.recv()
    pause = {PAUSE: functools.partial(time.sleep, 0.1)}
    yield {name: functools.partial(run, name) for name in names} | pause
  finally:
    parent_end.close()
    process.join()


def check_installed(*names: str) -> None:
  """Raises SystemExit if one of the libraries is not installed."""
  for name in names:
    if importlib.util.find_spec(name) is None:
      raise SystemExit(
        f"--peer needs the 'experiments' extra: {name} is not installed"
      )


def _serve(connection: Connection, programs: Callable[[], Runs]) -> None:
  runs = programs()
  connection.send(list(runs))
  while True:
    try:
      name = connection.recv()
    except EOFError:
      return
    runs[name]()
    connection.send(None)
