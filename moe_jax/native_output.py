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
  if not _python_writes_stdout():
    yield
    return
  sys.stdout.flush()
  stdout_fd, python_stdout = os.dup(_STDOUT), sys.stdout
  read_fd, write_fd = os.pipe()
  os.dup2(write_fd, _STDOUT)
  os.close(write_fd)
  sys.stdout = open(  # noqa: SIM115 - closed below
    stdout_fd,
    'w',
    encoding=python_stdout.encoding,
    errors=python_stdout.errors,
    buffering=1 if os.isatty(stdout_fd) else -1,
    closefd=False,
  )
  thread = threading.Thread(
    target=_forward, args=(read_fd, stdout_fd), daemon=True
  )
  thread.start()
  try:
    yield
  finally:
    sys.stdout.flush()
    sys.stdout = python_stdout
    # After this the pipe has no writer, and the thread ends.
    os.dup2(stdout_fd, _STDOUT)
    thread.join(timeout=1.0)
    os.close(stdout_fd)


def _python_writes_stdout() -> bool:
  try:
    return sys.stdout.fileno() == _STDOUT
  except (AttributeError, OSError, ValueError):
    return False


def _forward(read_fd: int, target_fd: int) -> None:
  """Copies lines from a pipe to a file, without those of Gloo."""
  with open(read_fd, 'rb') as lines, contextlib.suppress(OSError):
    for line in lines:
      if not line.startswith(_GLOO):
        os.write(target_fd, line)
