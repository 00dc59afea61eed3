"""The dense feed-forward layer, and the activations experts share with it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.kernels import grouped_ffn, grouped_matmul
from moe_jax.layers.initializers import Init, zeros
from moe_jax.layers.matmul import rows_matmul
from moe_jax.shapes import Array, Float, Int32


class Activation(NamedTuple):
  """An elementwise function, and whether a second product gates it.

  Attributes:
    function: Elementwise.
    gated: Whether the hidden values are function(x W_gate) * x W_in.
    cheap: Whether XLA computes it again rather than read its result.
  """

  function: Callable[[Array], Array]
  gated: bool
  cheap: bool = False

  def hidden(self, *products: Array) -> Array:
    """The hidden values of x W_in, or of x W_gate and x W_in."""
    first, *rest = products
    h = self.function(first)
    return h * rest[0] if rest else h


def _gelu(x):
  # jax.nn.gelu(approximate=False) is written with erfc, twice as slow on CPU.
  return 0.5 * x * (1.0 + jax.lax.erf(x * float(np.sqrt(0.5))))


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
  'relu': Activation(jax.nn.relu, False, cheap=True),
  'gelu': Activation(_gelu, False),
  'gelu_tanh': Activation(_gelu_tanh, False),
  'geglu': Activation(_gelu_tanh, True),  # arXiv:2002.05202
  'swiglu': Activation(jax.nn.silu, True),
}


def activation(name: str) -> Activation:
  """The activation of that name; ValueError names those that exist."""
  if name not in ACTIVATIONS:
    raise unknown('activation', name, ACTIVATIONS)
  return ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class FfnConfig:
  """A feed-forward layer M -> F -> M.

  Attributes:
    hidden: F.
    activation: One of `ACTIVATIONS`; gated ones have a third kernel.
    use_bias: Whether both products add a bias.
    dropout: Rate on the hidden values, in training.
    dtype: Of the products and the output.
    param_dtype: Of the stored parameters.
    init: How kernels start.
  """

  hidden: int
  activation: str = 'relu'
  use_bias: bool = False
  dropout: float = 0.0
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  init: Init = Init()

  def __post_init__(self):
    activation(self.activation)
    if self.hidden < 1:
      raise ValueError(f'hidden={self.hidden} must be at least 1')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout} not in [0, 1)')


class FeedForward(nn.Module):
  """x -> activation(x W_in) W_out, or (activation(x W_gate) * x W_in) W_out."""

  config: FfnConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, '... M'], train: bool = False
  ) -> Float[Array, '... M']:
    """Applies the layer to every token; dropout only if `train`."""
    # Rows, not [B, T, M]: the kernel's gradient then contracts one dimension,
    # which XLA's CPU compiler turns into a plain matmul; with two it copies.
    rows = x.reshape(-1, x.shape[-1])
    return feed_forward(self, self.config, rows, train).reshape(x.shape)


def feed_forward(
  module: nn.Module,
  c: FfnConfig,
  x: Float[Array, '*E R M'],
  train: bool,
  group_sizes: Int32[Array, ' experts'] | None = None,
  backend: str = 'auto',
) -> Float[Array, '*E R M']:
  """One feed-forward layer on rows, or E of them.

  E layers take E lists of rows, or one list sorted by layer with
  `group_sizes`. The parameters are `module`'s: w_in, w_gate where the
  activation gates, w_out, and b_in, b_out where there are biases; each
  [E, ...] for E layers.
  """
  stack = x.shape[:-2] if group_sizes is None else group_sizes.shape
  p = _parameters(module, c, stack, x.shape[-1])
  act = activation(c.activation)
  x = x.astype(c.dtype)
  names = ['w_gate', 'w_in'] if act.gated else ['w_in']
  dropout = nn.Dropout(c.dropout, deterministic=not train, parent=module)
  if group_sizes is not None and not c.use_bias and not (train and c.dropout):
    w_ins = tuple(p[name] for name in names)
    return grouped_ffn(x, w_ins, p['w_out'], group_sizes, act.hidden, backend)

  def product(x, name, **options):
    if group_sizes is None:
      return rows_matmul(x, p[name], **options)
    return grouped_matmul(x, p[name], group_sizes, backend)

  def with_bias(y, name):
    if not c.use_bias:
      return y
    b = p[name].astype(c.dtype)
    if group_sizes is None:
      return y + b[..., None, :]
    # Rows of no expert get the last one's; no one reads them.
    return y + jnp.repeat(b, group_sizes, 0, total_repeat_length=y.shape[0])

  products = [product(x, name) for name in names]
  products[-1] = with_bias(products[-1], 'b_in')
  h = dropout(act.hidden(*products))
  y = product(h, 'w_out', transposed_alone=not act.cheap)
  return with_bias(y, 'b_out')


def _parameters(
  module: nn.Module, c: FfnConfig, stack: tuple[int, ...], width: int
) -> dict[str, Any]:
  M, F = width, c.hidden
  axes = ('expert',) * len(stack)
  mlp = 'expert_mlp' if stack else 'mlp'
  p = {}

  def kernel(name, shape, names, residual=False):
    init = c.init.kernel((*axes, *names), residual=residual)
    p[name] = module.param(name, init, (*stack, *shape), c.param_dtype)

  def bias(name, size, axis):
    if c.use_bias:
      init, shape = zeros((*axes, axis)), (*stack, size)
      p[name] = module.param(name, init, shape, c.param_dtype)

  kernel('w_in', (M, F), ('embed', mlp))
  bias('b_in', F, mlp)
  if activation(c.activation).gated:
    kernel('w_gate', (M, F), ('embed', mlp))
  kernel('w_out', (F, M), (mlp, 'embed'), residual=True)
  bias('b_out', M, 'embed')
  return p
