"""The host's memory: its allocator, and the regions that programs take."""

import ctypes
import os
import pathlib
import sys

import jax

# Numbers of options of `mallopt`, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST = 2**31 - 1
# Files of the drivers of GPUs and TPUs, in /dev.
_DRIVERS = ('nvidiactl', 'dxg', 'kfd', 'accel[0-9]*', 'vfio/[0-9]*')


def keep_freed_memory() -> bool:
  """Makes glibc keep freed memory and reuse it; returns whether it does.

  XLA's CPU backend allocates a step's temporaries anew at every step. Above 32
  MiB glibc maps them from the system and unmaps them at the end, so that each
  step pays a page fault for every 4 KiB. The price is that resident memory
  stays at its peak, and that threads wait for each other to allocate: without
  glibc, or where the backend is no CPU, nothing is changed.
  """
  if not sys.platform.startswith('linux') or not _cpu_is_backend():
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    return False
  # One arena for all threads: one of a thread's own holds at most 64 MiB.
  settings = (
    (_M_MMAP_THRESHOLD, _LARGEST),
    (_M_TRIM_THRESHOLD, _LARGEST),
    (_M_ARENA_MAX, 1),
  )
  return all([mallopt(name, value) for name, value in settings])


def _cpu_is_backend() -> bool:
  """Whether JAX will run on the CPU; asking JAX would start its backends."""
  if platforms := os.environ.get('JAX_PLATFORMS'):
    return platforms.split(',')[0] == 'cpu'
  return not any(any(pathlib.Path('/dev').glob(name)) for name in _DRIVERS)


def forget_programs(most_regions: int = 20_000) -> None:
  """Clears JAX's compiled programs if the process has many mapped regions.

  Linux allows a process 65,530 regions, of which each program that XLA compiled
  for a CPU takes a few. Without one left, XLA raises an error that says "Failed
  to materialize symbols", or ends the process. A process that trains many
  models calls this between them. Elsewhere than on Linux nothing is cleared.

  Args:
    most_regions: The number of regions up to which nothing is cleared.
  """
  regions = pathlib.Path('/proc/self/maps')
  if regions.exists() and regions.read_bytes().count(b'\n') > most_regions:
    jax.clear_caches()
