"""Paths of storage, texts of its errors, and retries after transient errors."""

import errno
import itertools
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from moe_jax.errors import InputError

_LOG = logging.getLogger(__name__)
_LONGEST_CAUSE = 120
# Errors of a network, a server or a busy device, after which another try may
# succeed; after a full disk, a missing permission or path none would.
_TRANSIENT = {
  getattr(errno, name)
  for name in (
    'EAGAIN', 'EBUSY', 'ECONNABORTED', 'ECONNREFUSED', 'ECONNRESET',
    'EHOSTDOWN', 'EHOSTUNREACH', 'EINTR', 'EIO', 'ENETDOWN', 'ENETRESET',
    'ENETUNREACH', 'ENOLCK', 'EREMOTEIO', 'ESTALE', 'ETIMEDOUT',
  )
  if hasattr(errno, name)
}  # fmt: skip
# tensorstore raises ValueErrors whose text begins with a status.
_STATUS = re.compile(r'(ABORTED|DEADLINE_EXCEEDED|UNAVAILABLE)\b')
# HTTP statuses: timeout, too many requests, and errors of the server.
_HTTP = re.compile(r'408|429|5\d\d')
_CODE = re.compile(r"\[os_error_code='(\d+)'\]")


class Retry(NamedTuple):
  """Calls a function again after a transient storage error.

  Attributes:
    tries: Number of calls at most; at least 1.
    wait_seconds: Seconds before the second call; each further wait is twice as
      long.
  """

  tries: int = 1
  wait_seconds: float = 1.0

  def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args)`, after several calls if needed.

    The error of the last call, or one that is not transient, is raised.
    """
    for number in itertools.count(1):
      try:
        return function(*args)
      except Exception as error:
        if number >= self.tries or not is_transient(error):
          raise
        seconds = self.wait_seconds * 2 ** (number - 1)
        facts = describe(error), seconds, number + 1, self.tries
        _LOG.warning('%s; trying again in %g s (try %d of %d)', *facts)
        time.sleep(seconds)


def is_transient(error: BaseException | None) -> bool:
  """Whether another try may succeed after an error; None gives False.

  An error of unknown kind is judged by its cause.
  """
  while error is not None:
    # Names are compared, since requests, aiohttp and gcsfs, whose errors have a
    # status or a code, need not be installed.
    names = [kind.__name__ for kind in type(error).__mro__]
    statuses = [str(getattr(error, n, None)) for n in ('code', 'status')]
    if any(name.endswith('ConnectionError') for name in names):
      return True
    if any(map(_HTTP.fullmatch, statuses)):
      return True
    if isinstance(error, OSError) and error.errno is not None:
      return error.errno in _TRANSIENT
    if code := _CODE.search(str(error)):
      return int(code[1]) in _TRANSIENT
    if isinstance(error, TimeoutError) or _STATUS.match(str(error)):
      return True
    error = error.__cause__
  return False


def storage_path(path: str | os.PathLike[str]) -> epath.Path:
  """A local path made absolute, or a URL as it is.

  Raises:
    ValueError: No installed file system has URLs with this beginning.
  """
  try:
    expanded = epath.Path(path).expanduser()
  except KeyError as error:
    raise InputError(
      f'{os.fspath(path)}: no file system has URLs that begin with {error}'
    ) from None
  # Resolving `gs://bucket` would give a local folder of that name.
  return expanded if '://' in os.fspath(expanded) else expanded.resolve()


def describe(error: BaseException) -> str:
  """One line on an error; of a long text only the end, which has the cause."""
  text = str(error).split('\n', 1)[0]
  text = re.split(r" \[\w+='", text)[0]  # tensorstore appends its whole spec
  if len(text) > _LONGEST_CAUSE:
    text = f'...{text[-_LONGEST_CAUSE:]}'
  return f'{type(error).__name__}: {text}'
