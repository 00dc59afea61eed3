"""A thread that prepares batches ends with an error or an end, never hangs."""

import ctypes
import itertools
import threading
import time

import pytest

from moe_jax.data.pipeline import DataError, ahead


@pytest.fixture(autouse=True)
def other_threads():
  """Threads of other tests' streams that have not been collected yet."""
  _other_threads[:] = threading.enumerate()


_other_threads = []


def threads():
  new_threads = [t for t in threading.enumerate() if t not in _other_threads]
  return [t for t in new_threads if t.name == 'batches']


def wait_for_end():
  deadline = time.monotonic() + 20
  while threads():
    assert time.monotonic() < deadline, 'the thread goes on'
    time.sleep(0.01)
  return True


def test_elements_come_in_order_and_a_few_ahead():
  elements = []

  def source():
    for i in range(9):
      elements.append(i)
      yield i

  stream = ahead(source(), first=0, most=2)
  assert not elements
  assert next(stream) == 0
  time.sleep(0.2)
  # At most two elements wait in the queue, and the thread holds another.
  assert len(elements) <= 4
  assert [0, *stream] == list(range(9))
  assert wait_for_end()


@pytest.mark.parametrize(
  ('error', 'text'),
  [
    (KeyError('row 7'), "KeyError: 'row 7'"),
    (SystemExit(3), 'SystemExit: 3'),  # would end a thread silently
  ],
)
def test_whatever_ends_the_thread_is_an_error_that_names_it(error, text):
  def source():
    yield from range(3)
    raise error

  stream = ahead(source(), first=5, most=4)
  assert list(itertools.islice(stream, 3)) == [0, 1, 2]
  with pytest.raises(DataError, match='batch 8 could not be made') as caught:
    next(stream)
  assert str(caught.value).endswith(text)
  assert caught.value.__cause__ is error
  with pytest.raises(StopIteration):
    next(stream)


def test_a_thread_that_is_struck_between_elements_is_no_hang():
  # Prefetching by grain would wait for ever here.
  reached, go_on = threading.Event(), threading.Event()

  def source():
    yield 0
    reached.set()
    while not go_on.is_set():
      time.sleep(0.005)

  stream = ahead(source(), first=0, most=1)
  assert next(stream) == 0
  reached.wait(20)
  (thread,) = threads()
  ctypes.pythonapi.PyThreadState_SetAsyncExc(
    ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
  )
  with pytest.raises(DataError, match='batch 1 could not be made: SystemExit'):
    next(stream)


def test_a_stream_that_is_given_up_ends_its_thread():
  stream = ahead(itertools.count(), first=0, most=1)
  assert next(stream) == 0
  assert threads()
  stream.close()
  assert wait_for_end()
