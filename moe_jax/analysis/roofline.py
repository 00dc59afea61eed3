"""The least time work can take on this machine, from its measured peaks.

A program can be no faster than its FLOPs at the speed of the fastest large
matmul, nor than the bytes it must move at the speed of a copy. Not here: what
a program does beyond what it must (`compiled`), or timing it (experiments).
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_SQUARES = tuple(1 << n for n in range(9, 15))
_LONG_ENOUGH = 0.05  # seconds of one product
_COPY_BYTES = 1 << 28
_REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Peaks:
  """What the machine reaches on the simplest programs.

  Attributes:
    flops_per_second: Of a large square matmul, two a multiply-add.
    bytes_per_second: Of `x + 1` on an array beyond any cache, reads and writes
      counted.
    dtype: Of the matmul's operands.
    matmul_size: Its rows and columns.
    copy_bytes: Read and written by the copy.
  """

  flops_per_second: float
  bytes_per_second: float
  dtype: str
  matmul_size: int
  copy_bytes: int

  def describe(self) -> str:
    """One line for a person."""
    return (
      f'measured peaks: {self.flops_per_second / 1e9:,.0f} GFLOP/s '
      f'({self.dtype} matmul), {self.bytes_per_second / 1e9:,.1f} GB/s (copy)'
    )


@dataclasses.dataclass(frozen=True)
class Work:
  """What a program must do, whatever its form.

  Attributes:
    flops: Of its products.
    min_bytes: That memory must be read or written if caches hold all else.
  """

  flops: int
  min_bytes: int

  def seconds(self, peaks: Peaks) -> float:
    """The roofline: the larger of both times, as if they overlapped fully."""
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
  """A feed-forward layer, dense or sparse, with K rows a token.

  Forward reads every kernel and the tokens, and writes the output: W + 2 N M.
  Backward reads the kernels, the tokens and the output's gradient, and writes
  the gradients of kernels and tokens: 2 W + 3 N M more. Rows and hidden values
  move in caches, and nothing is recomputed.

  Args:
    num_tokens: N.
    width: M.
    hidden: F of one expert.
    num_experts: E, each with its own kernels; 1 is a dense layer.
    num_selected: Choices of a token that are served: K, or fewer on average.
    num_kernels: 2, or 3 of a gated activation.
    router: Whether the router's kernel and products count.
    backward: Whether the gradient of kernels and tokens is computed too.
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
  """Runs matmuls of growing size and a copy; the best of several of each.

  Args:
    dtype: Of the matmul's operands.
    quick: Small arrays: for tests, since caches then serve the copy.
  """
  rate, best = 0.0, 0
  for n in _SQUARES[:1] if quick else _SQUARES:
    seconds = _best(_matmul(n, dtype))
    if 2 * n**3 / seconds > rate:
      rate, best = 2 * n**3 / seconds, n
    if seconds > _LONG_ENOUGH:
      break
  size = _COPY_BYTES >> 8 if quick else _COPY_BYTES
  return Peaks(rate, 2 * size / _best(_copy(size)), dtype, best, 2 * size)


MATMUL, COPY = 'peak matmul', 'peak copy'


def probes(peaks: Peaks) -> dict[str, Callable[[], jax.Array]]:
  """The peaks' own programs, to be timed among others: a machine drifts."""
  return {
    MATMUL: _matmul(peaks.matmul_size, peaks.dtype),
    COPY: _copy(peaks.copy_bytes // 2),
  }


def by_round(
  peaks: Peaks, seconds: Mapping[Any, Sequence[float]]
) -> list[Peaks]:
  """What the machine reached in each round in which `probes` were timed."""
  return [
    dataclasses.replace(
      peaks,
      flops_per_second=2 * peaks.matmul_size**3 / matmul,
      bytes_per_second=peaks.copy_bytes / copy,
    )
    for matmul, copy in zip(seconds[MATMUL], seconds[COPY], strict=True)
  ]


def _matmul(n: int, dtype: str) -> Callable[[], jax.Array]:
  # Normal numbers: the power that a chip draws, and so its clock, depends on
  # how many bits flip.
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
  """Seconds of the fastest of several runs, after one that warms up."""
  jax.block_until_ready(run())
  times = []
  for _ in range(_REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times)
