"""The peaks of this machine, and the least time that work takes on it.

A program takes at least the time that its FLOPs take at the speed of the
fastest large matmul, and that its bytes take at the speed of a copy.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.analysis.roofline import SIZES, least_seconds, matmul, product_rate

_COPY_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Peaks:
  """The speeds that the machine reaches on the simplest programs.

  Attributes:
    flops_per_second: FLOPs per second of a large square matmul, two for a
      multiply-add.
    bytes_per_second: Bytes per second that `x + 1` reads and writes, on an
      array larger than any cache.
    dtype: Type of the operands of the matmul.
    matmul_size: Number of rows, and of columns, of those operands.
    copy_bytes: Bytes that the copy reads and writes.
  """

  flops_per_second: float
  bytes_per_second: float
  dtype: str
  matmul_size: int
  copy_bytes: int

  def describe(self) -> str:
    """The peaks in one line for a person."""
    return (
      f'measured peaks: {self.flops_per_second / 1e9:,.0f} GFLOP/s '
      f'({self.dtype} matmul), {self.bytes_per_second / 1e9:,.1f} GB/s (copy)'
    )


@dataclasses.dataclass(frozen=True)
class Work:
  """The work that a program cannot avoid, however it is written.

  Attributes:
    flops: FLOPs of its products.
    min_bytes: Bytes that it must read and write in memory if caches hold all
      other arrays.
  """

  flops: int
  min_bytes: int

  def seconds(self, peaks: Peaks) -> float:
    """The roofline: the longer of the times of products and of memory.

    The two are taken to overlap fully.
    """
    in_memory = self.min_bytes / peaks.bytes_per_second
    return max(self.flops / peaks.flops_per_second, in_memory)


def measure_peaks(dtype: str = 'float32', *, quick: bool = False) -> Peaks:
  """Times matmuls of growing size and a copy, the best of several runs each.

  Args:
    dtype: Type of the operands of the matmul.
    quick: Whether arrays are small, so that caches serve the copy; for tests.
  """
  rate, num_rows = product_rate(dtype, SIZES[:1] if quick else SIZES)
  size = _COPY_BYTES >> 8 if quick else _COPY_BYTES
  copied = 2 * size / least_seconds(_copy(size))
  return Peaks(rate, copied, dtype, num_rows, 2 * size)


MATMUL, COPY = 'peak matmul', 'peak copy'


def probes(peaks: Peaks) -> dict[str, Callable[[], jax.Array]]:
  """The programs of the peaks, to be timed among others.

  The speed of a machine drifts, so timings are compared with peaks of the same
  minutes.
  """
  return {
    MATMUL: matmul(peaks.matmul_size, peaks.dtype),
    COPY: _copy(peaks.copy_bytes // 2),
  }


def by_round(peaks: Peaks, times: Mapping[Any, Sequence[float]]) -> list[Peaks]:
  """The peaks of each round of timings that `probes` were a part of.

  Args:
    peaks: The peaks whose probes were timed.
    times: Times of each program by its name, one for each round.
  """
  return [
    dataclasses.replace(
      peaks,
      flops_per_second=2 * peaks.matmul_size**3 / matmul,
      bytes_per_second=peaks.copy_bytes / copy,
    )
    for matmul, copy in zip(times[MATMUL], times[COPY], strict=True)
  ]


def _copy(size: int) -> Callable[[], jax.Array]:
  x = jnp.zeros(size // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1).lower(x).compile()
  return lambda: copy(x)
