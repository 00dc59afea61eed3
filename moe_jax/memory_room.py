"""Memory: whether arrays fit into it, and how the host's is kept and freed.

What fits is arithmetic, before anything is allocated. The bound is the memory
of the devices, or of the machine where these are its processors; nothing is
refused that could fit.
"""

import ctypes
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence

import jax

from moe_jax.errors import InputError

_LIMIT = pathlib.Path('/sys/fs/cgroup/memory.max')


def check_room(
  needs: Iterable[tuple[str, int]],
  devices: Sequence[jax.Device] | None = None,
) -> None:
  """Raises ValueError where bytes are more than the devices have together.

  Args:
    needs: Texts on what needs memory, each with a number of bytes.
    devices: The devices. Default: all of JAX's.
  """
  devices = jax.devices() if devices is None else devices
  room = memory_of(devices)
  for purpose, num_bytes in needs:
    if room and num_bytes > room:
      kind = devices[0].device_kind
      raise InputError(
        f'{purpose}: at least {in_bytes(num_bytes)}, and {len(devices)} '
        f'devices of kind {kind!r} have {in_bytes(room)} of memory together; '
        'make it smaller, or take more devices'
      )


def memory_of(devices: Sequence[jax.Device]) -> int:
  """Bytes of memory of all these devices; 0 where they are not known.

  Processors of one process share the memory of the machine.
  """
  if devices[0].platform == 'cpu':
    return host_bytes() * len({device.process_index for device in devices})
  local_devices = [d for d in devices if d.process_index == jax.process_index()]
  try:
    stats = (local_devices[0].memory_stats() if local_devices else None) or {}
  except (RuntimeError, NotImplementedError):  # a described topology
    return 0
  return stats.get('bytes_limit', 0) * len(devices)


def host_bytes(limit_file: pathlib.Path = _LIMIT) -> int:
  """Bytes of memory that this process may have.

  They are those of the machine, or fewer where Linux limits the control group
  of the process.

  Args:
    limit_file: File with the limit of the control group: a number, or 'max'.
  """
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  try:
    limit = limit_file.read_text().strip()
  except OSError:
    return physical
  return min(physical, int(limit)) if limit.isdigit() else physical


def in_bytes(n: int) -> str:
  """A number of bytes with a unit, a power of ten: 93405585408 is '93.4 GB'."""
  for unit, size in (('TB', 1e12), ('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if n >= size:
      return f'{n / size:.3g} {unit}'
  return f'{n} B'


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
