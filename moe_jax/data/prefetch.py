"""Batches made ahead by a thread whose death never blocks the training.

grain's own prefetching gives up its thread when an exception reaches it between
two elements, and then waits for it for ever. Not here: batches (`pipeline.py`).
"""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar('T')
# Seconds between checks whether a thread that gives nothing is still alive.
_LOOK_SECONDS = 1.0


class DataError(RuntimeError):
  """A batch could not be made; its text says which, and why."""


def ahead(source: Iterator[T], *, first: int, most: int) -> Iterator[T]:
  """The elements of `source`, up to `most` of them made before they are asked.

  The thread begins with the first `next` and ends with the iterator.

  Args:
    source: Iterator that only the thread uses.
    first: Number of its first element, for messages.
    most: Number of elements that wait at most; at least 1.

  Raises:
    DataError: `source` raised anything, or the thread is gone; `next` raises
      it, and the iterator is then at its end.
  """
  made: queue.Queue[tuple[T] | None] = queue.Queue(most)
  given_up = threading.Event()
  failures: list[BaseException] = []

  def work():
    try:
      for element in source:
        made.put((element,))
        if given_up.is_set():
          return
    except BaseException as error:  # SystemExit too: it is no end of the run
      failures.append(error)
    finally:
      if not given_up.is_set():
        made.put(None)

  thread = threading.Thread(target=work, name='batches', daemon=True)
  thread.start()
  number = first
  try:
    while (element := _next(made, thread)) is not None:
      yield element[0]
      number += 1
    if failures:
      error = failures[0]
      raise DataError(
        f'batch {number} could not be made: {type(error).__name__}: {error}'
      ) from error
  finally:
    given_up.set()
    while not made.empty():  # room, for a thread that waits for it
      made.get_nowait()


def _next(made: queue.Queue, thread: threading.Thread):
  while True:
    alive = thread.is_alive()
    try:
      return made.get(timeout=_LOOK_SECONDS)
    except queue.Empty:
      if not alive:
        raise DataError('the thread that makes batches is gone') from None
