"""Signals that stop a run after a step or a batch: SIGTERM and Ctrl-C."""

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from moe_jax.runs.progress import print_line

# Numbers of calls, by which JAX agrees on the step after which to stop. It
# stops at a number above all that it has got, and 0 counts as one: the numbers
# of a resumed run's steps would begin beyond it.
_CALLS = itertools.count(1)
_SAVING = 'moe_jax: stopping, and saving first; another Ctrl-C stops at once'


@contextlib.contextmanager
def catching_sigterm() -> Iterator[Callable[[], bool]]:
  """Catches SIGTERM; gives a function that says whether to stop now.

  The function is called once after each step, and before each batch of an
  evaluation, until it says so. With several processes JAX catches the signal,
  and all stop at the same call, which none had made when the first of them got
  the signal.
  """
  if jax.process_count() > 1:
    yield lambda: multihost_utils.reached_preemption_sync_point(next(_CALLS))
    return
  received = []
  try:
    handler = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
  except ValueError:  # not the main thread: signals are the caller's
    yield lambda: False
    return
  try:
    yield lambda: bool(received)
  finally:
    signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def catching_interrupt() -> Iterator[list[int]]:
  """Makes the first Ctrl-C a SIGTERM; gives the list of signals caught.

  The second stops at once: in a notebook the cell, elsewhere the process.
  A caller's own handler stays, and so does that of a job that ignores Ctrl-C.
  """
  old_handler, received = signal.getsignal(signal.SIGINT), []

  def on_first_interrupt(number, _):
    received.append(number)
    # The prompt ps1 exists where Python is used interactively.
    next_handler = old_handler if hasattr(sys, 'ps1') else signal.SIG_DFL
    signal.signal(signal.SIGINT, next_handler)
    signal.raise_signal(signal.SIGTERM)
    # The signal may have come while this stream was written to.
    with contextlib.suppress(RuntimeError):
      print_line(_SAVING, sys.stderr)

  is_main_thread = threading.current_thread() is threading.main_thread()
  if old_handler is not signal.default_int_handler or not is_main_thread:
    yield received
    return
  signal.signal(signal.SIGINT, on_first_interrupt)
  try:
    yield received
  finally:
    signal.signal(signal.SIGINT, old_handler)
