"""Errors whose message says what is wrong and what helps.

Commands print the message of such an error without a traceback. Any other error
is a defect of this package, of a library or of a user's class, and keeps its
traceback.
"""

import contextlib
import errno
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

# The system's messages for a full disk, a user's quota, and a limit on a file's
# size. Libraries raise errors of their own types, known by these messages.
_FULL = [*map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))]


class ReportedError(Exception):
  """An error whose message is enough, so that commands print no traceback."""


class InputError(ReportedError, ValueError):
  """A refused value; the message gives the value, the rule and what exists."""


def from_extra(module: str, extra: str, use: str) -> ModuleType:
  """Imports a module that an extra of this package installs.

  Args:
    module: Name of the module.
    extra: Name of the extra.
    use: What needs the module, in words.

  Raises:
    ValueError: The module cannot be imported; the message names the extra.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise InputError(
      f"{use}: {error}; pip install 'moe_jax[{extra}]'"
    ) from None


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Names `path` in the error that a full disk causes while the body writes.

  Raises:
    OSError: The disk is full.
  """
  try:
    yield
  except Exception as error:
    reasons = [text for text in _FULL if text in str(error)]
    if not reasons:
      raise
    raise OSError(
      f'{path} cannot be written, as the disk is full: {reasons[0]}'
    ) from error
