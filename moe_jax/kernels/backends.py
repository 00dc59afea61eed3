"""The backends of the grouped products, and the choice of one by platform.

A backend is a module with two functions, equal in value on every shape:

- `matmul(x [N, M], w [E, M, F], group_sizes [E], transposed) -> [N, F]`, in
  the type of x and summed in float32; with `transposed`, w is [E, F, M]. Rows
  past the sum of the group sizes come out zero.
- `outer(x [N, M], dy [N, F], group_sizes [E]) -> [E, M, F]`, float32: x^T dy
  over each group's rows, zero for an empty group, whatever the rows past the
  sum hold.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import jax

from moe_jax.kernels import blocks, megablox, pallas_gpu, ragged_dot
from moe_jax.options import unknown
from moe_jax.shapes import Array, Float, Float32, Int32

BACKENDS: dict[str, ModuleType] = {
  'blocks': blocks,  # any platform; chosen on CPUs
  'ragged_dot': ragged_dot,  # any platform; XLA's own
  'megablox': megablox,  # TPUs
  'pallas_gpu': pallas_gpu,  # NVIDIA GPUs
}
AUTO = 'auto'
# The backend that 'auto' stands for on each platform; other platforms get the
# compiler's own. A TPU's is not `ragged_dot`: jax 0.10.2 compiles its outer
# product to E times the FLOPs, for v4, v5e, v5p and v6e.
BY_PLATFORM = {'cpu': 'blocks', 'tpu': 'megablox', 'cuda': 'pallas_gpu'}
DEFAULT = 'ragged_dot'


def check(name: str) -> None:
  """Raises ValueError unless `name` is a backend or 'auto'."""
  if name != AUTO and name not in BACKENDS:
    raise unknown('grouped_matmul backend', name, [AUTO, *BACKENDS])


def describe(name: str, platform: str) -> str:
  """The backend on a platform: 'blocks', or 'megablox, interpreted: slow'."""
  if name == AUTO:
    return BY_PLATFORM.get(platform, DEFAULT)
  homes = {backend: home for home, backend in BY_PLATFORM.items()}
  slow = platform == 'cpu' and homes.get(name, 'cpu') != 'cpu'
  return f'{name}, interpreted: slow' if slow else name


# Layers have few shapes of products: `jit` traces those of all platforms once
# for each.
@functools.partial(jax.jit, static_argnames=('transposed', 'backend'))
def matmul(
  x: Float[Array, 'N _'],
  w: Float[Array, 'E _ _'],
  group_sizes: Int32[Array, ' E'],
  transposed: bool,
  backend: str,
) -> Float[Array, 'N _']:
  """The product of `matmul`, by the backend of that name."""

  def run(name):
    return lambda *args: BACKENDS[name].matmul(*args, transposed)

  return choose(run, backend, x, w, group_sizes)


@functools.partial(jax.jit, static_argnames='backend')
def outer(
  x: Float[Array, 'N M'],
  dy: Float[Array, 'N F'],
  group_sizes: Int32[Array, ' E'],
  backend: str,
) -> Float32[Array, 'E M F']:
  """The product of `outer`, by the backend of that name."""
  return choose(lambda name: BACKENDS[name].outer, backend, x, dy, group_sizes)


def choose(run: Callable[[str], Callable], backend: str, *args):
  """Calls run(backend)(*args); for 'auto' the compiler picks the backend."""
  if backend != AUTO:
    return run(backend)(*args)
  return jax.lax.platform_dependent(
    *args,
    default=run(DEFAULT),
    **{platform: run(name) for platform, name in BY_PLATFORM.items()},
  )
