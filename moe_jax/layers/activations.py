"""The activations of feed-forward layers and of experts."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.kernels import cpu
from moe_jax.options import unknown
from moe_jax.shapes import Array


class Activation(NamedTuple):
  """An elementwise function, and the products that its values multiply.

  Attributes:
    function: The elementwise function.
    gated: Whether the hidden values are function(x W_gate) * x W_in.
    cheap: Whether XLA computes the function again rather than read its result.
    saved_arrays: The number of arrays as wide as the hidden values that the
      forward pass keeps for the backward pass, products included.
    limit: The largest value of the gate's product, and the largest size of the
      other one's; None for no limit.
    shift: The number that is added to the product that is gated.
    doubly_gated: Whether the hidden values are multiplied by x W_factor, too.
  """

  function: Callable[[Array], Array]
  gated: bool
  cheap: bool = False
  saved_arrays: int = 4
  limit: float | None = None
  shift: float = 0.0
  doubly_gated: bool = False

  @property
  def kernels(self) -> tuple[str, ...]:
    """Names of the kernels that multiply x, in the order of `hidden`."""
    gate = ('w_gate',) if self.gated else ()
    return (*gate, 'w_in', *(('w_factor',) if self.doubly_gated else ()))

  def hidden(self, *products: Array) -> Array:
    """The hidden values of the products of x with `kernels`."""
    argument, *factors = products
    if self.limit is not None:
      argument = jnp.minimum(argument, self.limit)
      factors = [jnp.clip(value, -self.limit, self.limit) for value in factors]
    h = self.function(argument)
    if self.shift:
      factors[0] += self.shift
    for value in factors:
      h = h * value
    return h


def _quick_gelu(x: Array) -> Array:
  """x sigmoid(1.702 x)."""
  return x * jax.nn.sigmoid(1.702 * x)


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
  'relu': Activation(jax.nn.relu, False, cheap=True, saved_arrays=1),
  'gelu': Activation(cpu.gelu, False),
  'gelu_tanh': Activation(_gelu_tanh, False, saved_arrays=6),
  'geglu': Activation(_gelu_tanh, True, saved_arrays=8),  # arXiv:2002.05202
  'swiglu': Activation(jax.nn.silu, True, saved_arrays=6),
  # gpt-oss has it, with swiglu_alpha 1.702, swiglu_limit 7, and x W_in + 1.
  'clamped_swiglu': Activation(
    _quick_gelu, True, saved_arrays=9, limit=7.0, shift=1.0
  ),
  # OpenMoE has it: a third product multiplies a SwiGLU.
  'doubly_gated_swiglu': Activation(
    jax.nn.silu, True, saved_arrays=8, doubly_gated=True
  ),
}


def activation(name: str) -> Activation:
  """The activation of that name; raises ValueError for an unknown one."""
  if name not in ACTIVATIONS:
    raise unknown('activation', name, ACTIVATIONS)
  return ACTIVATIONS[name]
