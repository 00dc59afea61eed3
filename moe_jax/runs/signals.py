"""Signals that end a run after it has saved."""

import contextlib
import itertools
import signal
import sys
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from moe_jax.cli import print_line

# Numbers of the calls in which processes ask JAX whether to stop. All stop at
# the first number that no process had passed when the signal came; if none had
# passed any, at 1, so the first call has the number 1. Steps would not do as
# numbers: a resumed run begins above 1 and would then never stop.
_CALLS = itertools.count(1)
_SAVING = 'moe_jax: stopping, and saving first; another Ctrl-C stops at once'


@contextlib.contextmanager
def _handling(number: int, handler: Callable[..., None]) -> Iterator[None]:
  """Handles the signal `number` with `handler` while the body runs.

  Outside the main thread this does nothing, as Python lets only the main thread
  set a handler.
  """
  try:
    old_handler = signal.signal(number, handler)
  except ValueError:  # not the main thread: signals are the caller's
    yield
    return
  try:
    yield
  finally:
    signal.signal(number, old_handler)


@contextlib.contextmanager
def catching_sigterm() -> Iterator[Callable[[], bool]]:
  """Catches SIGTERM; gives a function that returns whether to stop now.

  The function is called once after each step, and before each batch of an
  evaluation, until it returns True. With several processes JAX catches the
  signal, and all processes stop at the same call, which none of them had made
  when the first of them got the signal.
  """
  if jax.process_count() > 1:
    yield lambda: multihost_utils.reached_preemption_sync_point(next(_CALLS))
    return
  received = []
  with _handling(signal.SIGTERM, lambda *_: received.append(True)):
    yield lambda: bool(received)


@contextlib.contextmanager
def catching_interrupt() -> Iterator[list[int]]:
  """Makes the first Ctrl-C a SIGTERM; gives the list of signals caught.

  The second Ctrl-C stops the cell of a notebook at once, and elsewhere the
  process. A caller's own handler stays, and so does that of a job that ignores
  Ctrl-C.
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

  if old_handler is not signal.default_int_handler:
    yield received
    return
  with _handling(signal.SIGINT, on_first_interrupt):
    yield received
