"""The least time that work takes on this machine, from its measured peaks.

A program takes at least the time that its FLOPs take at the speed of the
fastest large matmul, and that its bytes take at the speed of a copy.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_SIZES = tuple(1 << n for n in range(9, 15))
_ROWS = {'cpu': 1024}  # rows of the only matmul, by platform
_DEFAULT_ROWS = 8192
_MAX_SECONDS = 0.05  # seconds of a product, after which no larger one is tried
_COPY_BYTES = 1 << 28
_REPEATS = 7


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
  rate, num_rows = product_rate(dtype, _SIZES[:1] if quick else _SIZES)
  size = _COPY_BYTES >> 8 if quick else _COPY_BYTES
  return Peaks(rate, 2 * size / _best(_copy(size)), dtype, num_rows, 2 * size)


def product_rate(
  dtype: str = 'float32', sizes: Sequence[int] = ()
) -> tuple[float, int]:
  """FLOPs per second of the fastest of some square matmuls, and its rows.

  Args:
    dtype: Type of the operands.
    sizes: Numbers of rows, in rising order, of which those that would take long
      are left out; () is one that is large enough for this platform, and takes
      less than a second in all.
  """
  if not sizes:
    sizes = (_ROWS.get(jax.local_devices()[0].platform, _DEFAULT_ROWS),)
  rate, num_rows = 0.0, 0
  for n in sizes:
    seconds = _best(_matmul(n, dtype))
    if 2 * n**3 / seconds > rate:
      rate, num_rows = 2 * n**3 / seconds, n
    if seconds > _MAX_SECONDS:
      break
  return rate, num_rows


MATMUL, COPY = 'peak matmul', 'peak copy'


def probes(peaks: Peaks) -> dict[str, Callable[[], jax.Array]]:
  """The programs of the peaks, to be timed among others.

  The speed of a machine drifts, so timings are compared with peaks of the same
  minutes.
  """
  return {
    MATMUL: _matmul(peaks.matmul_size, peaks.dtype),
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


def _matmul(n: int, dtype: str) -> Callable[[], jax.Array]:
  # The operands are drawn, since the power that a chip takes, and so its clock,
  # depends on how many bits flip.
  x, y = (
    jax.random.normal(jax.random.key(i), (n, n), jnp.float32).astype(dtype)
    for i in range(2)
  )
  product = jax.jit(jnp.matmul).lower(x, y).compile()
  return lambda: product(x, y)


def _copy(size: int) -> Callable[[], jax.Array]:
  x = jnp.zeros(size // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1).lower(x).compile()
  return lambda: copy(x)


def _best(run: Callable[[], jax.Array]) -> float:
  """Seconds of the fastest of several runs; one more run warms up first."""
  jax.block_until_ready(run())
  times = []
  for _ in range(_REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times)
