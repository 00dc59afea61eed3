"""The dense feed-forward layer, and the activations experts share with it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.layers.initializers import Init, zeros
from moe_jax.layers.rows_product import rows_matmul
from moe_jax.shapes import Array, Float


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

  @property
  def first_kernels(self) -> tuple[str, ...]:
    """Those that x meets, in the order that `Activation.hidden` takes."""
    gated = activation(self.activation).gated
    return ('w_gate', 'w_in') if gated else ('w_in',)


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


class DeepFeedForward(nn.Module):
  """A feed-forward layer with `depth` hidden layers of F: M -> F ... F -> M.

  At a depth of 1 it is `FeedForward`, parameters too.
  """

  config: FfnConfig
  depth: int

  @nn.compact
  def __call__(
    self, x: Float[Array, '... M'], train: bool = False
  ) -> Float[Array, '... M']:
    """Applies the layer to every token; dropout only if `train`."""
    c = self.config
    act = activation(c.activation)
    if act.gated or self.depth < 1:
      raise ValueError(
        f'depth={self.depth} with activation={c.activation!r}: a deep '
        'feed-forward has a depth of at least 1 and an activation without gate'
      )
    rows = x.reshape(-1, x.shape[-1]).astype(c.dtype)
    p = parameters(self, c, (), rows.shape[-1])

    def hidden(rows, w, bias):
      y = rows_matmul(rows, w)
      h = act.hidden(y + p[bias].astype(c.dtype)[None] if c.use_bias else y)
      return nn.Dropout(c.dropout, deterministic=not train)(h)

    h = hidden(rows, p['w_in'], 'b_in')
    for i in range(1, self.depth):
      init = c.init.kernel(('mlp', None))
      shape, bias = (c.hidden, c.hidden), f'b_hidden_{i}'
      w = self.param(f'w_hidden_{i}', init, shape, c.param_dtype)
      if c.use_bias:
        p[bias] = self.param(bias, zeros((None,)), shape[:1], c.param_dtype)
      h = hidden(h, w, bias)
    y = rows_matmul(h, p['w_out'])
    y = y + p['b_out'].astype(c.dtype)[None] if c.use_bias else y
    return y.reshape(x.shape)


def feed_forward(
  module: nn.Module, c: FfnConfig, x: Float[Array, '*E R M'], train: bool
) -> Float[Array, '*E R M']:
  """One feed-forward layer on rows, or E of them on E lists of rows.

  The parameters are `module`'s; see `parameters`.
  """
  p = parameters(module, c, x.shape[:-2], x.shape[-1])
  return compute(
    c,
    p,
    x.astype(c.dtype),
    product=rows_matmul,
    add_bias=lambda y, b: y + b[..., None, :],
    dropout=nn.Dropout(c.dropout, deterministic=not train, parent=module),
  )


def compute(
  c: FfnConfig,
  p: dict[str, Any],
  x: Float[Array, '*E R M'],
  *,
  product: Callable[..., Array],
  add_bias: Callable[[Array, Array], Array],
  dropout: Callable[[Array], Array],
) -> Float[Array, '*E R M']:
  """The layer, of whatever a product with kernels is."""
  act = activation(c.activation)
  products = [product(x, p[name]) for name in c.first_kernels]
  if c.use_bias:
    products[-1] = add_bias(products[-1], p['b_in'].astype(c.dtype))
  h = dropout(act.hidden(*products))
  y = product(h, p['w_out'], transposed_alone=not act.cheap)
  return add_bias(y, p['b_out'].astype(c.dtype)) if c.use_bias else y


def parameters(
  module: nn.Module, c: FfnConfig, stack: tuple[int, ...], width: int
) -> dict[str, Any]:
  """`module`'s w_in, w_gate where the activation gates, w_out; and b_in, b_out.

  Each is [*stack, ...]; the biases only where there are any.
  """
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
