"""Lines that a C++ library prints to standard output, without those of Gloo.

Gloo, which connects the CPUs of several processes, prints a line for each group
of devices that communicates, at any time in a run, and has no option for it.
What Python prints, and all of standard error, goes where it went before.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_GLOO = b'[Gloo] Rank '
_STDOUT = 1


@contextlib.contextmanager
def without_gloo() -> Iterator[None]:
  """Leaves out Gloo's lines while the body runs, as far as it can.

  Where Python's standard output is not that of the process, as in a notebook or
  a test, nothing is changed.
  """
  if not _is_own():
    yield
    return
  sys.stdout.flush()
  own, before = os.dup(_STDOUT), sys.stdout
  read, write = os.pipe()
  os.dup2(write, _STDOUT)
  os.close(write)
  sys.stdout = open(  # noqa: SIM115 - closed below
    own,
    'w',
    encoding=before.encoding,
    errors=before.errors,
    buffering=1 if os.isatty(own) else -1,
    closefd=False,
  )
  thread = threading.Thread(target=_forward, args=(read, own), daemon=True)
  thread.start()
  try:
    yield
  finally:
    sys.stdout.flush()
    sys.stdout = before
    os.dup2(own, _STDOUT)  # the pipe has no writer now, and the thread ends
    thread.join(timeout=1.0)
    os.close(own)


def _is_own() -> bool:
  try:
    return sys.stdout.fileno() == _STDOUT
  except (AttributeError, OSError, ValueError):
    return False


def _forward(read: int, write: int) -> None:
  """Copies lines from a pipe to a file, without those of Gloo."""
  with open(read, 'rb') as lines, contextlib.suppress(OSError):
    for line in lines:
      if not line.startswith(_GLOO):
        os.write(write, line)
