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
def turns(programs: Callable[[], Runs], *libraries: str) -> Iterator[Runs]:
  """The programs as functions that run them in the other process.

  The last function is a pause, as the threads of PyTorch wait for their next
  work on the processors: let no other case follow the programs at once.

  Args:
    programs: A function that can be pickled, and that the other process calls
      for the programs by name.
    *libraries: Names of the libraries that the programs need.

  Raises:
    SystemExit: One of the libraries is not installed.
  """
  for name in libraries:
    if importlib.util.find_spec(name) is None:
      raise SystemExit(
        f"--peer needs the 'experiments' extra: {name} is not installed"
      )
  context = multiprocessing.get_context('spawn')
  connection, other_end = context.Pipe()
  serve = functools.partial(_serve, other_end, programs)
  process = context.Process(target=serve, daemon=True)
  process.start()
  other_end.close()

  def run(name):
    connection.send(name)
    connection.recv()

  with connection:  # the process ends where the connection is closed
    runs = {name: functools.partial(run, name) for name in connection.recv()}
    yield runs | {PAUSE: functools.partial(time.sleep, 0.1)}
  process.join()


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
