"""Whether arrays fit into memory: arithmetic, before anything is allocated.

The bound is the memory of the devices, or of the machine where these are its
processors; nothing is refused that could fit.
"""

import os
import pathlib
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
