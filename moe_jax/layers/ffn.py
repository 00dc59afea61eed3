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
    c = self.config
    M, F = x.shape[-1], c.hidden
    function, gated = activation(c.activation)
    param = functools.partial(self.param, unbox=True)
    shape = x.shape
    # Rows, not [B, T, M]: the kernel's gradient then contracts one dimension,
    # which XLA's CPU compiler turns into a plain matmul; with two it copies.
    x = x.reshape(-1, M).astype(c.dtype)

    def kernel(name, shape, axes, residual=False):
      init = c.init.kernel(axes, residual=residual)
      return param(name, init, shape, c.param_dtype).astype(c.dtype)

    def bias(name, shape, axes):
      return param(name, zeros(axes), shape, c.param_dtype).astype(c.dtype)

    h = rows_matmul(x, kernel('w_in', (M, F), ('embed', 'mlp')))
    if c.use_bias:
      h = h + bias('b_in', (F,), ('mlp',))[None]
    if gated:
      gate = rows_matmul(x, kernel('w_gate', (M, F), ('embed', 'mlp')))
      h = function(gate) * h
    else:
      h = function(h)
    h = nn.Dropout(c.dropout, deterministic=not train)(h)
    y = rows_matmul(h, kernel('w_out', (F, M), ('mlp', 'embed'), residual=True))
    if c.use_bias:
      y = y + bias('b_out', (M,), ('embed',))[None]
    return y.reshape(shape)
