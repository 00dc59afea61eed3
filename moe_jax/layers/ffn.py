"""The dense feed-forward layer, and the activations experts share with it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.layers.initializers import Init, zeros
from moe_jax.layers.matmul import rows_matmul
from moe_jax.shapes import Array, Float


class Activation(NamedTuple):
  """An elementwise function, and whether a second product gates it."""

  function: Callable[[Array], Array]
  gated: bool


def _gelu(x):
  # jax.nn.gelu(approximate=False) is written with erfc, twice as slow on CPU.
  return 0.5 * x * (1.0 + jax.lax.erf(x * float(np.sqrt(0.5))))


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
  'relu': Activation(jax.nn.relu, False),
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
) -> Float[Array, '*E R M']:
  """One feed-forward layer on rows, or E of them on E lists of rows.

  The parameters are `module`'s: w_in, w_gate where the activation gates, w_out,
  and b_in, b_out where there are biases; each [E, ...] for E lists.
  """
  E, M, F = x.shape[:-2], x.shape[-1], c.hidden
  stack = ('expert',) * len(E)
  mlp = 'expert_mlp' if E else 'mlp'
  function, gated = activation(c.activation)
  x = x.astype(c.dtype)

  def kernel(name, shape, axes, residual=False):
    init = c.init.kernel((*stack, *axes), residual=residual)
    return module.param(name, init, (*E, *shape), c.param_dtype)

  def with_bias(y, name, axis):
    if not c.use_bias:
      return y
    init, shape = zeros((*stack, axis)), (*E, y.shape[-1])
    b = module.param(name, init, shape, c.param_dtype)
    return y + b.astype(c.dtype)[..., None, :]

  h = rows_matmul(x, kernel('w_in', (M, F), ('embed', mlp)))
  h = with_bias(h, 'b_in', mlp)
  if gated:
    gate = rows_matmul(x, kernel('w_gate', (M, F), ('embed', mlp)))
    h = function(gate) * h
  else:
    h = function(h)
  h = nn.Dropout(c.dropout, deterministic=not train, parent=module)(h)
  y = rows_matmul(h, kernel('w_out', (F, M), (mlp, 'embed'), residual=True))
  return with_bias(y, 'b_out', 'embed')
