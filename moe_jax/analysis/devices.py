"""The memory of devices that a model might run on."""

import dataclasses

import jax

from moe_jax.memory_room import host_bytes
from moe_jax.options import unknown

HERE = 'here'


@dataclasses.dataclass(frozen=True)
class Device:
  """A kind of device that a model might run on.

  Attributes:
    name: Name of the device, as a table prints it.
    num_bytes: Bytes of all its memory, including those that a runtime reserves;
      0 where the number is unknown.
  """

  name: str
  num_bytes: int


# Memory as vendors print it, in powers of ten.
_KNOWN = {
  # NVIDIA H100 Tensor Core GPU data sheet, SXM and PCIe.
  'h100': Device('H100-80GB', 80 * 10**9),
  # NVIDIA H200 Tensor Core GPU data sheet.
  'h200': Device('H200-141GB', 141 * 10**9),
  # https://cloud.google.com/tpu/docs/v5e and its neighbours, for one chip.
  'v4': Device('TPU v4', 32 * 10**9),
  'v5e': Device('TPU v5e', 16 * 10**9),
  'v5p': Device('TPU v5p', 95 * 10**9),
  'v6e': Device('TPU v6e', 32 * 10**9),
}
NAMES = (*_KNOWN, HERE)


def get(name: str) -> Device:
  """The device of that name; 'here' is the first device of this machine.

  Raises:
    ValueError: The name is none of `NAMES`.
  """
  if name not in NAMES:
    raise unknown('device', name, NAMES)
  if name in _KNOWN:
    return _KNOWN[name]
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return Device('this machine', host_bytes())
  num_bytes = (device.memory_stats() or {}).get('bytes_limit', 0)
  return Device(f'this {device.device_kind}', num_bytes)
