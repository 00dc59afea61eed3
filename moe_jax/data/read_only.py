"""Whether data may be written: a dry run only reads what is there."""

import contextlib
import contextvars
from collections.abc import Iterator

from moe_jax.errors import InputError

_READ_ONLY = contextvars.ContextVar('read_only', default=False)


class NotPreparedError(InputError):
  """Data is not in the cache yet, where nothing may be written now."""


@contextlib.contextmanager
def reading_only() -> Iterator[None]:
  """Refuses, while the body runs, to prepare what the cache lacks."""
  before = _READ_ONLY.set(True)
  try:
    yield
  finally:
    _READ_ONLY.reset(before)


def may_write() -> bool:
  """Whether something may be written, which it may not in `reading_only`."""
  return not _READ_ONLY.get()


def check_may_prepare(description: str) -> None:
  """Raises NotPreparedError where data is only to be read.

  Args:
    description: Name of the data that would be prepared, for the message.
  """
  if not may_write():
    raise NotPreparedError(f'{description} is not prepared yet')
