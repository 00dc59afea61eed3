"""Runs tasks, so many at a time, one in each place; stopped cleanly.

A task begins when it is given a place, and says itself whether it has ended.
Not here: what a place is: devices for the processes of a command
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
  """A task that has begun."""

  def ended(self) -> bool:
    """Whether nothing of it runs any more."""

  def outcome(self) -> str:
    """`DONE`, `FAILED` or `STOPPED`, once it has ended."""

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
  """Runs every task; the outcome of each, by name.

  A task that fails does not stop the others. SIGTERM and Ctrl-C ask the tasks
  that run to save and stop, and no other begins; those that take longer than
  `grace_seconds` are killed, and so are all at a second signal.

  Args:
    tasks: Functions that begin a task in a place, by the name of the task, in
      the order in which they begin.
    places: One for each task that runs at a time.
    grace_seconds: Seconds from asking a task to stop to killing it.
    message: Prints a line.
    begins: Called with the name of a task that is about to begin.
    ends: Called with the name, the outcome and the task that has ended.
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
        # A task that is killed on request has not failed by itself.
        if received and outcomes[name] == FAILED:
          outcomes[name] = STOPPED
        ends(name, outcomes[name], task)
      if running:
        time.sleep(_POLL_SECONDS)
  return outcomes


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """A list that fills with the SIGINTs and SIGTERMs that arrive."""
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
