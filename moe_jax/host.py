"""The host's memory allocator, tuned for XLA's CPU buffers."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_GIBIBYTE = 1 << 30


def keep_freed_memory() -> bool:
  """Makes glibc keep buffers up to 1 GiB when they are freed.

  XLA's CPU backend allocates a step's temporaries anew at every step. Above 32
  MiB glibc maps them from the system and unmaps them at the end, so that each
  step pays a page fault for every 4 KiB. Elsewhere than on glibc, where there
  is nothing to tune, returns False.
  """
  if not sys.platform.startswith('linux'):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    return False
  return bool(
    mallopt(_M_MMAP_THRESHOLD, _GIBIBYTE)
    and mallopt(_M_TRIM_THRESHOLD, _GIBIBYTE)
  )
