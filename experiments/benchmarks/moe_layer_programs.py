"""The programs that `bench_moe_layer` times.

They are sparse layers, dense layers and bare matrix products of equal shapes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import roofline
from moe_jax import kernels
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import (
  ACTIVATIONS,
  DISPATCHES,
  FeedForward,
  FeedForwardExpert,
  FfnOptions,
  MoE,
  MoeOptions,
  Numerics,
  Shared,
)
from moe_jax.layers.routers import TokenChoice
from moe_jax.routing.capacity import All, PerAssignment
from moe_jax.shapes import Array

LAYERS = ('gather', 'sorted', 'dropless')
# The layers whose capacity factor of 1 drops choices.
DROPPING = LAYERS[:2]
DENSE, PLAIN_DENSE = 'dense', 'dense, plain jnp'
BATCHED = ('batched matmul', 'batched rows_matmul')
GROUPED = ('grouped_ffn', 'grouped_matmul')
RAGGED = 'ragged_dot'
EQUAL = ', equal groups'
# Names of the passes, by whether the gradient is computed.
PASSES = {False: 'forward', True: 'forward+backward'}
# The balance loss takes part in the gradient, as in training.
_BALANCE_WEIGHT = 0.01


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes that all settings of a table share.

  Attributes:
    num_tokens: Number of tokens N.
    width: Model width M.
    hidden: Hidden width F of one expert.
    activation: Activation of the experts.
    dtype: Type of parameters and activations.
  """

  num_tokens: int
  width: int
  hidden: int
  activation: str = 'relu'
  dtype: str = 'float32'

  @property
  def kernel_names(self) -> tuple[str, ...]:
    """Names of an expert's input kernels; the output kernel is 'w_out'."""
    gated = ACTIVATIONS[self.activation].gated
    return ('w_gate', 'w_in') if gated else ('w_in',)

  @property
  def shared(self) -> Shared:
    """The numeric types, which all layers share."""
    return Shared(Numerics(dtype=self.dtype, param_dtype=self.dtype))

  def kernel_bytes(self, E: int) -> int:
    """Bytes of the kernels of E experts, which their gradients have too."""
    kernels = len(self.kernel_names) + 1
    size = E * kernels * self.width * self.hidden
    return size * jnp.dtype(self.dtype).itemsize

  def work(
    self, E: int, K: int | float, *, backward: bool, router: bool
  ) -> roofline.Work:
    """The least work of a layer of E experts, or with E=1 of a dense layer.

    Args:
      E: Number of experts.
      K: Mean number of choices of a token that are served.
      backward: Whether the gradient is counted too.
      router: Whether the router is counted too.
    """
    return roofline.ffn_work(
      num_tokens=self.num_tokens,
      width=self.width,
      hidden=self.hidden,
      num_experts=E,
      num_selected=K,
      num_kernels=len(self.kernel_names) + 1,
      router=router,
      backward=backward,
      itemsize=jnp.dtype(self.dtype).itemsize,
    )


def moe_layer(sizes: Sizes, E: int, K: int, dispatch: str) -> MoE:
  """A sparse layer; one of `DROPPING` has capacity factor 1."""
  options = MoeOptions(
    num_experts=E,
    num_selected=K,
    router=TokenChoice(gates='raw' if K == 1 else 'renormalized'),
    capacity=PerAssignment(factor=1.0) if dispatch in DROPPING else All(),
    expert=FeedForwardExpert(sizes.hidden, sizes.activation, 0.0),
    dispatch=DISPATCHES.builtin[dispatch](),
  )
  return MoE(options, sizes.shared)


def layer_function(module: MoE, backward: bool) -> Callable[..., Any]:
  """The layer as a function (params, x, dy) -> (y, aux).

  With `backward` it returns the gradients of params and x too.
  """

  def forward(params, x):
    y, aux = module.apply({'params': params}, x)
    return (y, aux.balance_loss), aux

  def forward_backward(params, x, dy):
    (y, _), pull, aux = jax.vjp(forward, params, x, has_aux=True)
    return y, aux, pull((dy, _BALANCE_WEIGHT / aux.stats.tokens))

  def forward_only(params, x, dy):
    del dy
    (y, _), aux = forward(params, x)
    return y, aux

  return forward_backward if backward else forward_only


def with_gradient(function: Callable[..., Array], backward: bool):
  """A function (params, x, dy, ...) -> y, from one that does not take dy.

  With `backward` it returns the gradients of params and x too.
  """

  def gradients(params, x, dy, *more):
    y, pull = jax.vjp(lambda p, x: function(p, x, *more), params, x)
    return y, pull(dy)

  return (
    gradients if backward else lambda p, x, dy, *more: function(p, x, *more)
  )


def dense_functions(sizes: Sizes) -> dict[str, Callable[..., Array]]:
  """Dense layers (params, x) -> y: `FeedForward`, and the same in plain jnp."""
  ffn = FfnOptions(sizes.hidden, sizes.activation)
  module = FeedForward(ffn, sizes.shared)

  def plain(params, x):
    h = ACTIVATIONS[sizes.activation].hidden(
      *(x @ params[n] for n in sizes.kernel_names)
    )
    return h @ params['w_out']

  return {
    DENSE: lambda params, x: module.apply({'params': params}, x),
    PLAIN_DENSE: plain,
  }


def bare_functions(sizes: Sizes) -> dict[str, Callable[..., Array]]:
  """Bare products (experts' kernels, rows, group sizes) -> rows, no routing."""

  def two(product, w, x, *more):
    firsts = (product(x, w[name], *more) for name in sizes.kernel_names)
    return product(
      ACTIVATIONS[sizes.activation].hidden(*firsts), w['w_out'], *more
    )

  def batched(product, w, x, group_sizes):
    return two(
      product, w, x.reshape(group_sizes.size, -1, x.shape[-1])
    ).reshape(x.shape)

  def grouped_ffn(w, x, group_sizes):
    firsts = tuple(w[name] for name in sizes.kernel_names)
    return kernels.grouped_ffn(
      x, firsts, w['w_out'], group_sizes, ACTIVATIONS[sizes.activation].hidden
    )

  return {
    BATCHED[0]: functools.partial(batched, jnp.matmul),
    BATCHED[1]: functools.partial(batched, rows_matmul),
    GROUPED[0]: grouped_ffn,
    GROUPED[1]: functools.partial(two, kernels.grouped_matmul),
    RAGGED: functools.partial(two, jax.lax.ragged_dot),
  }
