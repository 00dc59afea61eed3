"""Runs tasks in places, one at a time in each, and stops them cleanly.

A place is whatever a task needs to run: devices for the processes of a command
(`processes.py`), or a worker that calls Python functions (`workers.py`).
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

_POLL_SECONDS = 0.05
DONE, FAILED, STOPPED, WAITING = 'done', 'failed', 'stopped', 'not started'


class Running(Protocol):
  """Interface of a task that has begun."""

  def ended(self) -> bool:
    """Whether all processes of the task have ended."""

  def outcome(self) -> str:
    """`DONE`, `FAILED` or `STOPPED`; called once the task has ended."""

  def signal(self, number: int) -> None:
    """Sends the signal to every process of the task."""


Place = TypeVar('Place')
Begin = Callable[[Place], Running]


def _nothing(*args: object) -> None:
  del args


def run_all(
  tasks: Mapping[str, Begin],
  places: Sequence[Place],
  *,
  grace_seconds: float = 120.0,
  message: Callable[[str], None] = print,
  begins: Callable[[str], None] = _nothing,
  ends: Callable[[str, str, Running], None] = _nothing,
) -> dict[str, str]:
  """Runs every task and returns the outcome of each, by name.

  A task that fails does not stop the others. At SIGTERM or Ctrl-C no further
  task begins, and those that run are asked to save and stop; they are killed if
  they take longer than `grace_seconds`, or at a second signal.

  Args:
    tasks: Functions that begin a task in a place, by name of the task, in the
      order in which they begin.
    places: Places for tasks; as many tasks run at a time.
    grace_seconds: Seconds from asking a task to stop to killing it.
    message: Function that prints a line.
    begins: Function that is called with the name of a task before it begins.
    ends: Function that is called with the name, the outcome and the task, after
      it has ended.
  """
  outcomes = dict.fromkeys(tasks, WAITING)
  queue = list(tasks)
  running: dict[int, tuple[str, Running]] = {}
  killing_at = None
  with _signals() as received:
    while running or (queue and not received):
      for i, place in enumerate(places):
        if i not in running and queue and not received:
          name = queue.pop(0)
          begins(name)
          running[i] = name, tasks[name](place)
      if received and killing_at is None:
        message('stopping: each run saves, and the same command goes on')
        killing_at = time.monotonic() + grace_seconds
        for _, task in running.values():
          task.signal(signal.SIGTERM)
      if received and (len(received) > 1 or time.monotonic() > killing_at):
        for _, task in running.values():
          task.signal(signal.SIGKILL)
      for i in [i for i, (_, task) in running.items() if task.ended()]:
        name, task = running.pop(i)
        outcomes[name] = task.outcome()
        # A task that was killed because the user stops has not failed.
        if received and outcomes[name] == FAILED:
          outcomes[name] = STOPPED
        ends(name, outcomes[name], task)
      if running:
        time.sleep(_POLL_SECONDS)
  return outcomes


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Catches SIGINT and SIGTERM; yields the list of those received so far."""
  received: list[int] = []
  caught = signal.SIGINT, signal.SIGTERM
  before = [
    signal.signal(number, lambda number, _: received.append(number))
    for number in caught
  ]
  try:
    yield received
  finally:
    for number, handler in zip(caught, before, strict=True):
      signal.signal(number, handler)
