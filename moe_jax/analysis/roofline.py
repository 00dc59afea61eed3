"""Memory and peak FLOPs of devices, as vendors print them or as measured."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.config import unknown

# Numbers of rows of the matmuls of which the fastest is the measured peak.
SIZES = tuple(1 << n for n in range(9, 15))
_MAX_SECONDS = 0.05  # seconds of a product, after which no larger one is tried
_REPEATS = 7


def product_rate(
  dtype: str = 'float32', sizes: Sequence[int] = ()
) -> tuple[float, int]:
  """FLOPs per second of the fastest of some square matmuls, and its size.

  Args:
    dtype: Type of the operands.
    sizes: Numbers of rows, in rising order; after the first product that takes
      long, larger ones are not tried. () tries a single number, which is large
      enough for this platform and takes less than a second in all.

  Returns:
    The FLOPs per second, and the number of rows of the fastest matmul.
  """
  if not sizes:
    sizes = (1024 if jax.local_devices()[0].platform == 'cpu' else 8192,)
  rate, num_rows = 0.0, 0
  for n in sizes:
    seconds = least_seconds(matmul(n, dtype))
    if 2 * n**3 / seconds > rate:
      rate, num_rows = 2 * n**3 / seconds, n
    if seconds > _MAX_SECONDS:
      break
  return rate, num_rows


def matmul(n: int, dtype: str) -> Callable[[], jax.Array]:
  """A compiled function () -> product of two random [n, n] of type `dtype`."""
  # The operands are drawn, since the power that a chip takes, and so its clock,
  # depends on how many bits flip.
  x, y = (
    jax.random.normal(jax.random.key(i), (n, n), jnp.float32).astype(dtype)
    for i in range(2)
  )
  product = jax.jit(jnp.matmul).lower(x, y).compile()
  return lambda: product(x, y)


def least_seconds(run: Callable[[], jax.Array]) -> float:
  """Seconds of the fastest of several runs; one more run warms up first."""
  jax.block_until_ready(run())
  times = []
  for _ in range(_REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times)


class Device(NamedTuple):
  """A kind of device that a model might run on.

  Attributes:
    name: Name of the device, as a table prints it.
    num_bytes: Bytes of all memory of the device, including what a runtime
      reserves.
    kinds: Regular expression of the device's names in JAX (`device_kind`).
    peaks: FLOPs per second of dense products by type of the operands, as the
      vendor prints them. A type for which the vendor prints several speeds,
      such as float32 with and without TF32, is left out.
  """

  name: str
  num_bytes: int
  kinds: str
  peaks: Mapping[str, float]


def _device(name: str, gigabytes: int, kinds: str, teraflops: int) -> Device:
  """A `Device` of which only the speed of products in bfloat16 is listed."""
  return Device(name, gigabytes * 10**9, kinds, {'bfloat16': teraflops * 1e12})


# Memory and FLOPs per second as vendors print them, in powers of ten, without
# sparsity.
DEVICES = {
  # From NVIDIA's data sheets; the H100 is the SXM version.
  'h100': _device('H100-80GB', 80, 'NVIDIA H100 80GB HBM3', 989),
  'h200': _device('H200-141GB', 141, 'NVIDIA H200', 989),
  'a100': _device('A100-40GB', 40, 'NVIDIA A100-SXM4-[48]0GB', 312),
  'l4': _device('L4-24GB', 24, 'NVIDIA L4', 121),
  # A T4's tensor cores know no bfloat16.
  't4': Device('T4-16GB', 16 * 10**9, 'Tesla T4', {'float32': 8.1e12}),
  # https://cloud.google.com/tpu/docs/v5e and its neighbours, for one chip.
  'v4': _device('TPU v4', 32, 'TPU v4', 275),
  'v5e': _device('TPU v5e', 16, 'TPU v5 lite', 197),
  'v5p': _device('TPU v5p', 95, 'TPU v5p?', 459),
  'v6e': _device('TPU v6e', 32, 'TPU v6 lite', 918),
}


class Peak(NamedTuple):
  """The most FLOPs per second that products on some devices can reach.

  Attributes:
    flops_per_second: FLOPs per second of all the devices together, two for a
      multiply-add.
    source: The origin of the number, in words.
  """

  flops_per_second: float
  source: str


def device_of(name: str) -> Device:
  """The device that `DEVICES` lists under a name.

  Raises:
    ValueError: The name is none of `DEVICES`.
  """
  if name not in DEVICES:
    raise unknown('device', name, DEVICES)
  return DEVICES[name]


def num_processors(devices: Sequence[jax.Device]) -> int:
  """The number of devices; all CPU devices of a process count as one.

  The CPU devices of a process share the cores of its host.
  """
  if devices[0].platform != 'cpu':
    return len(devices)
  return len({device.process_index for device in devices})


def describe_mesh(mesh: Mesh) -> str:
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
  """The peak FLOPs per second of devices of one kind, as printed or measured.

  The vendor's number is taken. Where it is not known, as on a CPU, the peak is
  the speed of the fastest of some large square products on the first device:
  less than the hardware could reach. CPU devices of a process share its cores,
  and count as one.

  Args:
    dtype: Type of the operands of the products.
    devices: The devices. Default: all of JAX's.
    quick: Whether only a small product is measured; for tests.
  """
  devices = jax.devices() if devices is None else devices
  kind, count = devices[0].device_kind, num_processors(devices)
  if rate := vendor_rate(dtype, devices):
    return Peak(rate, f'{count} x {kind} by its data sheet')
  rate, n = product_rate(dtype, SIZES[:1] if quick else SIZES)
  return Peak(count * rate, f'a measured product of {n} x {n} matrices')


def vendor_rate(dtype: str, devices: Sequence[jax.Device]) -> float:
  """FLOPs per second of devices, as the vendor prints them; 0 if unknown.

  Args:
    dtype: Type of the operands of the products.
    devices: The devices, of one kind.
  """
  kind = devices[0].device_kind
  known = (d for d in DEVICES.values() if re.fullmatch(d.kinds, kind))
  peaks = next((device.peaks for device in known), {})
  return num_processors(devices) * peaks.get(dtype, 0.0)
