"""Elements that a thread makes in advance; its death never blocks the training.

grain's own prefetching waits for ever for its thread if an exception ends it
between two elements.
"""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

from moe_jax.errors import ReportedError

T = TypeVar('T')
# Seconds between checks whether the thread, while it is waited for, is alive.
_LOOK_SECONDS = 1.0


class DataError(ReportedError, RuntimeError):
  """A batch could not be made; the text names the batch and the reason."""


def ahead(source: Iterator[T], *, first: int, most: int) -> Iterator[T]:
  """The elements of `source`, which a thread makes in advance.

  The thread begins with the first `next` and ends with the iterator.

  Args:
    source: Iterator that only the thread uses.
    first: Number of its first element, for messages.
    most: Largest number of elements that are made in advance; at least 1.

  Raises:
    DataError: `source` raised an exception, or the thread has died; `next`
      raises it, and the iterator then ends.
  """
  elements: queue.Queue[tuple[T] | None] = queue.Queue(most)
  closed = threading.Event()
  failures: list[BaseException] = []

  def work():
    try:
      for element in source:
        elements.put((element,))
        if closed.is_set():
          return
    except BaseException as error:  # SystemExit, too, must not end the thread
      failures.append(error)
    finally:
      if not closed.is_set():
        elements.put(None)

  thread = threading.Thread(target=work, name='batches', daemon=True)
  thread.start()
  number = first
  try:
    while (element := _next(elements, thread)) is not None:
      yield element[0]
      number += 1
    if failures:
      error = failures[0]
      raise DataError(
        f'batch {number} could not be made: {type(error).__name__}: {error}'
      ) from error
  finally:
    closed.set()
    while not elements.empty():  # the thread may be waiting for room
      elements.get_nowait()


def _next(elements: queue.Queue, thread: threading.Thread):
  while True:
    alive = thread.is_alive()
    try:
      return elements.get(timeout=_LOOK_SECONDS)
    except queue.Empty:
      if not alive:
        raise DataError('the thread that makes batches is gone') from None
