"""Products of rows sorted by expert: each expert's rows by its own kernel.

MegaBlocks calls such a product grouped matmul
(https://arxiv.org/abs/2211.15841). This module has the gradients. A backend
computes the products, on every shape equal to those of other backends up to
rounding; it is a module with two functions:

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
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.kernels import blocks, megablox, pallas_gpu, ragged_dot, tokamax
from moe_jax.kernels.rows_product import HIDDEN
from moe_jax.shapes import Array, Float, Float32, Int32

# The name under which a remat policy finds the results of products.
PRODUCT = 'grouped_matmul'
BACKENDS: dict[str, ModuleType] = {
  'blocks': blocks,  # any platform; the default on platforms not below
  'megablox': megablox,  # TPUs
  'pallas_gpu': pallas_gpu,  # NVIDIA GPUs
  'ragged_dot': ragged_dot,  # any platform, by XLA; to compare with
  'tokamax': tokamax,  # GPUs and TPUs, where that package is installed
}
AUTO = 'auto'
# The backend that 'auto' stands for on a TPU and on an NVIDIA GPU, and the one
# for all other platforms. XLA's own `ragged_dot` is none of them: on CPUs it
# multiplies every row by every expert, and jax 0.10.2 compiles its outer
# product for a TPU to E times the FLOPs.
BY_PLATFORM, DEFAULT = {'tpu': 'megablox', 'cuda': 'pallas_gpu'}, 'blocks'


def describe(name: str, platform: str) -> str:
  """The backend's name, with a note where it is interpreted, and so is slow.

  Examples are 'blocks', and 'megablox, interpreted: slow' on the platform
  'cpu'. For 'auto' the name is that of the platform's backend.
  """
  if name == AUTO:
    return BY_PLATFORM.get(platform, DEFAULT)
  slow = platform == 'cpu' and name in BY_PLATFORM.values()
  return f'{name}, interpreted: slow' if slow else name


def grouped_matmul(
  x: Float[Array, 'N M'],
  w: Float[Array | np.ndarray, 'E M F'],
  group_sizes: Int32[Array, ' E'],
  backend: str = AUTO,
) -> Float[Array, 'N F']:
  """y[n] = x[n] @ w[e], e the group that row n is in; in the type of x.

  The first group_sizes[0] rows are expert 0's, the next group_sizes[1] expert
  1's, and so on. Rows past their sum belong to no expert: they come out zero
  and their gradient is zero. Sums are float32; the gradient of a float32
  kernel is never rounded to the type of x. Derivatives are reverse-mode and
  first-order. No compiler splits this product over devices: call the function
  on each device, under `shard_map` with check_vma=False
  (`partitioning.on_each_device`).

  Args:
    x: The rows, sorted by expert.
    w: The kernel of each expert.
    group_sizes: The number of rows of each expert, at least 0 and in all at
      most N. This is not checked: the numbers are known only at run time.
    backend: One of `BACKENDS`, or 'auto', the backend of the platform.

  Raises:
    ValueError: Shapes do not fit, or the backend is unknown.
  """
  _check_backend(backend)
  check_shapes(x, w, group_sizes)
  x, group_sizes = jnp.asarray(x), jnp.asarray(group_sizes)
  return checkpoint_name(_product(x, w, group_sizes, backend), PRODUCT)


def grouped_ffn(
  x: Float[Array, 'N M'],
  w_ins: tuple[Float[Array | np.ndarray, 'E M F'], ...],
  w_out: Float[Array | np.ndarray, 'E F M'],
  group_sizes: Int32[Array, ' E'],
  hidden: Callable[..., Array],
  backend: str = AUTO,
) -> Float[Array, 'N M']:
  """y[n] = hidden(x[n] @ w_in[e], ...) @ w_out[e], e the group of row n.

  The result has the type of x; rows past the sum of the group sizes come out
  zero. The backend 'blocks' does both products of a block in one loop; other
  backends do one product after the other. Derivatives are reverse-mode and
  first-order. On a mesh, call the function on each device, under `shard_map`.

  Args:
    x: The rows, sorted by expert.
    w_ins: The first kernels: one, or several whose products `hidden` combines.
    w_out: The last kernel.
    group_sizes: The number of rows of each expert, in all at most N.
    hidden: The elementwise function from the first products to the hidden
      values.
    backend: One of `BACKENDS`, or 'auto', the backend of the platform.

  Raises:
    ValueError: Shapes do not fit, or the backend is unknown.
  """
  _check_backend(backend)
  for w in w_ins:
    check_shapes(x, w, group_sizes)
  E, M, F = w_ins[0].shape
  if w_out.shape != (E, F, M) or any(w.shape != (E, M, F) for w in w_ins):
    raise InputError(
      f'first kernels {[w.shape for w in w_ins]} and last {w_out.shape} must '
      'be [E, M, F] and [E, F, M]'
    )
  x, group_sizes = jnp.asarray(x), jnp.asarray(group_sizes)
  y = _ffn(x, w_ins, w_out, group_sizes, hidden, backend)
  return checkpoint_name(y, PRODUCT)


def _check_backend(name: str) -> None:
  if name != AUTO and name not in BACKENDS:
    raise unknown('grouped_matmul backend', name, [AUTO, *BACKENDS])


def check_shapes(x, w, group_sizes) -> None:
  """Raises ValueError unless x [N, M], w [E, M, F] and integers [E] fit."""
  ranks = np.ndim(x), np.ndim(w), np.ndim(group_sizes)
  if ranks != (2, 3, 1):
    raise InputError(
      f'rows {np.shape(x)}, kernels {np.shape(w)} and group sizes '
      f'{np.shape(group_sizes)} must be [N, M], [E, M, F] and [E]'
    )
  if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
    raise InputError(f'group sizes of {group_sizes.dtype} must be integers')
  if x.shape[-1] != w.shape[1]:
    raise InputError(
      f'rows of width {x.shape[-1]} by kernels {w.shape}: the width must be '
      f'M={w.shape[1]}'
    )
  if group_sizes.shape[0] != w.shape[0]:
    raise InputError(
      f'{group_sizes.shape[0]} group sizes for {w.shape[0]} experts'
    )


def _choose(run: Callable[[str], Callable], backend: str, *args):
  """The result of run(name)(*args) for the name of a backend.

  `run` returns the function of arrays that the backend of a name computes. For
  'auto', the compiler picks the backend by platform.
  """
  if backend != AUTO:
    return run(backend)(*args)
  by_platform = {platform: run(name) for platform, name in BY_PLATFORM.items()}
  return jax.lax.platform_dependent(*args, default=run(DEFAULT), **by_platform)


# Under `jit`, the products of all platforms are traced once for each shape, of
# which a model has few, and not once for each call.
@functools.partial(jax.jit, static_argnames=('transposed', 'backend'))
def _matmul(
  x: Float[Array, 'N _'],
  w: Float[Array, 'E _ _'],
  group_sizes: Int32[Array, ' E'],
  transposed: bool,
  backend: str,
) -> Float[Array, 'N _']:
  def run(name):
    return lambda *args: BACKENDS[name].matmul(*args, transposed)

  return _choose(run, backend, x, w, group_sizes)


@functools.partial(jax.jit, static_argnames='backend')
def _outer(
  x: Float[Array, 'N M'],
  dy: Float[Array, 'N F'],
  group_sizes: Int32[Array, ' E'],
  backend: str,
) -> Float32[Array, 'E M F']:
  return _choose(lambda name: BACKENDS[name].outer, backend, x, dy, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x, w, group_sizes, backend):
  return _matmul(x, w.astype(x.dtype), group_sizes, False, backend)


def _product_forward(x, w, group_sizes, backend):
  return _product(x, w, group_sizes, backend), (x, w, group_sizes)


def _product_backward(backend, saved, dy):
  x, w, group_sizes = saved
  dx = _matmul(dy, w.astype(dy.dtype), group_sizes, True, backend)
  dw = _outer(x, dy, group_sizes, backend)
  return dx, dw.astype(w.dtype), None


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ffn(x, w_ins, w_out, group_sizes, hidden, backend):
  return _ffn_forward(x, w_ins, w_out, group_sizes, hidden, backend)[0]


def _ffn_forward(x, w_ins, w_out, group_sizes, hidden, backend):
  ins, out = tuple(w.astype(x.dtype) for w in w_ins), w_out.astype(x.dtype)

  def run(name):
    if name == 'blocks':
      return lambda *args: blocks.ffn(*args, hidden=hidden)

    def composed(x, ins, out, sizes):
      firsts = tuple(_matmul(x, w, sizes, False, name) for w in ins)
      return _matmul(hidden(*firsts), out, sizes, False, name), firsts

    return composed

  y, firsts = _choose(run, backend, x, ins, out, group_sizes)
  firsts = tuple(
    checkpoint_name(checkpoint_name(z, PRODUCT), HIDDEN) for z in firsts
  )
  return y, (x, w_ins, w_out, group_sizes, firsts)


def _ffn_backward(hidden, backend, saved, dy):
  x, w_ins, w_out, group_sizes, firsts = saved
  ins, out = tuple(w.astype(x.dtype) for w in w_ins), w_out.astype(x.dtype)

  def run(name):
    if name == 'blocks':
      return lambda *args: blocks.ffn_gradients(*args, hidden=hidden)

    def composed(x, ins, out, sizes, firsts, dy):
      h, pull = jax.vjp(hidden, *firsts)
      d_firsts = pull(_matmul(dy, out, sizes, True, name))
      dx = sum(_matmul(d, w, sizes, True, name) for d, w in zip(d_firsts, ins))
      dw_ins = tuple(_outer(x, d, sizes, name) for d in d_firsts)
      return dx, dw_ins, _outer(h, dy, sizes, name)

    return composed

  dx, dw_ins, dw_out = _choose(
    run, backend, x, ins, out, group_sizes, firsts, dy
  )
  dw_ins = tuple(dw.astype(w.dtype) for dw, w in zip(dw_ins, w_ins))
  return dx, dw_ins, dw_out.astype(w_out.dtype), None


_ffn.defvjp(_ffn_forward, _ffn_backward)
