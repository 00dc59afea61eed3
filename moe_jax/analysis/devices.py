"""The memory and the speed of devices that a model might run on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from moe_jax.analysis.roofline import measure_peaks
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
    peaks: FLOPs per second of dense products by type of the operands, as the
      vendor prints them; types whose products the vendor gives several speeds,
      such as float32 with and without TF32, are left out.
  """

  name: str
  num_bytes: int
  peaks: Mapping[str, float] = dataclasses.field(default_factory=dict)


# Memory and speed as vendors print them, in powers of ten, without sparsity.
_DEVICES = {
  # NVIDIA H100 Tensor Core GPU data sheet; the speed is that of SXM.
  'h100': Device('H100-80GB', 80 * 10**9, {'bfloat16': 989e12}),
  # NVIDIA H200 Tensor Core GPU data sheet.
  'h200': Device('H200-141GB', 141 * 10**9, {'bfloat16': 989e12}),
  # NVIDIA A100 Tensor Core GPU data sheet.
  'a100': Device('A100-40GB', 40 * 10**9, {'bfloat16': 312e12}),
  # NVIDIA L4 Tensor Core GPU data sheet.
  'l4': Device('L4-24GB', 24 * 10**9, {'bfloat16': 121e12}),
  # NVIDIA T4 data sheet; its tensor cores know no bfloat16.
  't4': Device('T4-16GB', 16 * 10**9, {'float32': 8.1e12}),
  # https://cloud.google.com/tpu/docs/v5e and its neighbours, for one chip.
  'v4': Device('TPU v4', 32 * 10**9, {'bfloat16': 275e12}),
  'v5e': Device('TPU v5e', 16 * 10**9, {'bfloat16': 197e12}),
  'v5p': Device('TPU v5p', 95 * 10**9, {'bfloat16': 459e12}),
  'v6e': Device('TPU v6e', 32 * 10**9, {'bfloat16': 918e12}),
}
NAMES = (*_DEVICES, HERE)
# The names of these devices by JAX's `device_kind`.
_NAME_OF_KIND = {
  'NVIDIA H100 80GB HBM3': 'h100',
  'NVIDIA H200': 'h200',
  'NVIDIA A100-SXM4-40GB': 'a100',
  'NVIDIA A100-SXM4-80GB': 'a100',
  'NVIDIA L4': 'l4',
  'Tesla T4': 't4',
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
}
_BFLOAT16_SINCE = 8.0  # CUDA's compute capability with products of bfloat16


class Peak(NamedTuple):
  """The most FLOPs per second that products on some devices can reach.

  Attributes:
    flops_per_second: FLOPs per second of all the devices together, two for a
      multiply-add.
    source: The origin of the number, in words.
  """

  flops_per_second: float
  source: str


def get(name: str) -> Device:
  """The device of that name; 'here' is the first device of this machine.

  Raises:
    ValueError: The name is none of `NAMES`.
  """
  if name not in NAMES:
    raise unknown('device', name, NAMES)
  if name in _DEVICES:
    return _DEVICES[name]
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return Device('this machine', host_bytes())
  num_bytes = (device.memory_stats() or {}).get('bytes_limit', 0)
  return Device(f'this {device.device_kind}', num_bytes)


def fast_dtype(device: jax.Device) -> str:
  """The type in which a device multiplies fastest, of those of models.

  It is 'bfloat16' on TPUs and on GPUs that have products of it, and 'float32'
  on CPUs and on older GPUs such as a T4, which compute bfloat16 in float32.
  """
  if device.platform == 'cpu':
    return 'float32'
  capability = getattr(device, 'compute_capability', '')
  try:
    return 'bfloat16' if float(capability) >= _BFLOAT16_SINCE else 'float32'
  except ValueError:  # not a device of CUDA
    return 'bfloat16'


def num_processors(devices: Sequence[jax.Device]) -> int:
  """The number of devices, of which CPU devices of a process count as one.

  They share the cores of a host.
  """
  if devices[0].platform != 'cpu':
    return len(devices)
  return len({device.process_index for device in devices})


def describe(mesh: Mesh) -> str:
  """A mesh's devices in a line: '8 x cpu, mesh data=2, expert=4'."""
  sizes = ', '.join(f'{axis}={n}' for axis, n in mesh.shape.items() if n > 1)
  text = f'{mesh.size} x {mesh.devices.flat[0].device_kind}'
  text += f', mesh {sizes}' * bool(sizes)
  processes = jax.process_count()
  return text + f', {processes} processes' * (processes > 1)


def peak(
  dtype: str,
  devices: Sequence[jax.Device] | None = None,
  *,
  quick: bool = False,
) -> Peak:
  """The peak of devices of one kind, from the vendor or else measured.

  Where the vendor's number is not known, as on a CPU, it is the speed of the
  fastest of some large square products on the first device: less than the
  hardware could reach. CPU devices of a process share its cores, and count as
  one.

  Args:
    dtype: Type of the operands of the products.
    devices: The devices. Default: all of JAX's.
    quick: Whether only a small product is measured; for tests.
  """
  devices = jax.devices() if devices is None else devices
  kind, count = devices[0].device_kind, num_processors(devices)
  peaks = _DEVICES[_NAME_OF_KIND[kind]].peaks if kind in _NAME_OF_KIND else {}
  if dtype in peaks:
    return Peak(count * peaks[dtype], f'{count} x {kind} by its data sheet')
  measured = measure_peaks(dtype, quick=quick)
  n = measured.matmul_size
  source = f'a measured product of {n} x {n} matrices'
  return Peak(count * measured.flops_per_second, source)
