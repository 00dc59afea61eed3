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
    return max(
      self.flops / peaks.flops_per_second,
      self.min_bytes / peaks.bytes_per_second,
    )


def ffn_work(
  *,
  num_tokens: int,
  width: int,
  hidden: int,
  num_experts: int = 1,
  num_selected: int | float = 1,
  num_kernels: int = 2,
  router: bool = False,
  backward: bool = False,
  itemsize: int = 4,
) -> Work:
  """The work of a feed-forward layer, dense or sparse.

  With N tokens of M values and W values in all kernels, the forward pass reads
  kernels and tokens and writes the output, W + 2 N M values. The backward pass
  reads kernels, tokens and the gradient of the output, and writes the gradients
  of kernels and tokens, 2 W + 3 N M values. Rows of experts and hidden values
  are taken to stay in caches, and nothing is computed twice.

  Args:
    num_tokens: N, the number of tokens.
    width: M, the width of the residual stream.
    hidden: F, the width of the hidden layer of one expert.
    num_experts: E, the number of experts, each with kernels of its own; 1 for a
      dense layer.
    num_selected: Number of choices of a token that are served: K, or fewer on
      average.
    num_kernels: Number of kernels: 2, or 3 with a gated activation.
    router: Whether the kernel and the products of a router count.
    backward: Whether the gradients of kernels and tokens are computed, too.
    itemsize: Bytes of a value.
  """
  N, M, F, E = num_tokens, width, hidden, num_experts
  kernels = E * num_kernels * M * F
  flops = round(2 * N * num_selected * num_kernels * M * F)
  if router:
    kernels += M * E
    flops += 2 * N * M * E
  if backward:
    return Work(3 * flops, itemsize * (3 * kernels + 5 * N * M))
  return Work(flops, itemsize * (kernels + 2 * N * M))


def measure_peaks(dtype: str = 'float32', *, quick: bool = False) -> Peaks:
  """Times matmuls of growing size and a copy, the best of several runs each.

  Args:
    dtype: Type of the operands of the matmul.
    quick: Whether arrays are small, so that caches serve the copy; for tests.
  """
  rate, num_rows = product_rate(dtype, SIZES[:1] if quick else SIZES)
  size = _COPY_BYTES >> 8 if quick else _COPY_BYTES
  return Peaks(
    rate, 2 * size / least_seconds(_copy(size)), dtype, num_rows, 2 * size
  )


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


def by_round(
  peaks: Peaks, seconds: Mapping[Any, Sequence[float]]
) -> list[Peaks]:
  """The peaks of each round of timings that `probes` were a part of.

  Args:
    peaks: The peaks whose probes were timed.
    seconds: Times of each program by its name, one for each round.
  """
  return [
    dataclasses.replace(
      peaks,
      flops_per_second=2 * peaks.matmul_size**3 / matmul,
      bytes_per_second=peaks.copy_bytes / copy,
    )
    for matmul, copy in zip(seconds[MATMUL], seconds[COPY], strict=True)
  ]


def _copy(size: int) -> Callable[[], jax.Array]:
  x = jnp.zeros(size // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1).lower(x).compile()
  return lambda: copy(x)
