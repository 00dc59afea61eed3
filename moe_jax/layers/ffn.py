"""The dense feed-forward layer, and the computation that experts share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import Options, option
from moe_jax.errors import InputError
from moe_jax.kernels import cpu, grouped_ffn, grouped_matmul
from moe_jax.kernels.grouped_products import AUTO
from moe_jax.kernels.rows_product import HIDDEN, rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.parameters import Initializer, Names
from moe_jax.layers.shared import Shared
from moe_jax.parallel.cost_model import Sizes
from moe_jax.shapes import Array, Float, Int32, PRNGKey, checked


class Activation(NamedTuple):
  """An elementwise function of x times a kernel; other products may scale it.

  Attributes:
    function: The elementwise function.
    kernels: Names of the kernels that multiply x. The function is applied to
      the first product; the other products multiply the function's value.
    cheap: Whether the function costs so little that XLA computes it again
      rather than read its stored result.
    saved_arrays: The number of arrays as wide as the hidden values that the
      forward pass keeps for the backward pass, products included.
    limit: The largest value of the first product, and the largest absolute
      value of the other products; larger ones are clipped. None for no limit.
    shift: The number that is added to the second product before the function's
      value multiplies it.
  """

  function: Callable[[Array], Array]
  kernels: tuple[str, ...] = ('w_in',)
  cheap: bool = False
  saved_arrays: int = 4
  limit: float | None = None
  shift: float = 0.0

  @property
  def gated(self) -> bool:
    """Whether another product of x multiplies the function's value (a GLU)."""
    return len(self.kernels) > 1

  def hidden(self, *products: Array) -> Array:
    """The hidden values, from the products of x with `kernels`, in order."""
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
  """x sigmoid(1.702 x), an approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
_GATED = ('w_gate', 'w_in')
ACTIVATIONS = {
  'relu': Activation(jax.nn.relu, cheap=True, saved_arrays=1),
  'gelu': Activation(cpu.gelu),
  'gelu_tanh': Activation(_gelu_tanh, saved_arrays=6),
  'geglu': Activation(_gelu_tanh, _GATED, saved_arrays=8),  # arXiv:2002.05202
  'swiglu': Activation(jax.nn.silu, _GATED, saved_arrays=6),
  # The activation of gpt-oss: swiglu_alpha 1.702, swiglu_limit 7, x W_in + 1.
  'clamped_swiglu': Activation(
    _quick_gelu, _GATED, saved_arrays=9, limit=7.0, shift=1.0
  ),
  # The activation of OpenMoE: a third product multiplies a SwiGLU.
  'doubly_gated_swiglu': Activation(
    jax.nn.silu, (*_GATED, 'w_factor'), saved_arrays=8
  ),
}


@dataclasses.dataclass(frozen=True)
class FfnOptions(Options):
  """The options of a feed-forward layer, from width M to F and back to M."""

  hidden: int = option(
    512, 'Width F of the hidden layer of a feed-forward.', minimum=1
  )
  activation: str = option(
    'gelu',
    'Activation between the two products of a feed-forward; gelu is the exact '
    'one, by the error function, and gelu_tanh its approximation by tanh, '
    'which geglu has, too. geglu, swiglu and clamped_swiglu (gpt-oss) have a '
    'third kernel, whose product gates the hidden values, and '
    'doubly_gated_swiglu (OpenMoE) a fourth, whose product multiplies them, '
    'too.',
    choices=ACTIVATIONS,
  )
  bias: str = option(
    '',
    "Biases of a feed-forward's products: 'all', the gate's included, or "
    "'none'; '': if model.use_bias, of all products but the gate's.",
    choices=('', 'all', 'none'),
  )

  def kernel_values(self, width: int) -> int:
    """The number of parameters in the kernels, where M is `width`."""
    kernels = len(ACTIVATIONS[self.activation].kernels) + 1
    return kernels * width * self.hidden

  def shrunk(self) -> 'FfnOptions':
    return dataclasses.replace(self, hidden=48)


@dataclasses.dataclass(frozen=True)
class FfnLayer:
  """The computation of a feed-forward layer, alone or as each of E experts.

  Attributes:
    options: The width and activation of the layer.
    shared: The settings that all layers of the model share.
    dropout: The rate at which hidden values are dropped in training.
    role: The part of the model that the parameters belong to, such as 'ffn'.
  """

  options: FfnOptions
  shared: Shared = Shared()
  dropout: float = 0.0
  role: str = 'ffn'

  @property
  def activation(self) -> Activation:
    """The activation between the first and the last product of the layer."""
    return ACTIVATIONS[self.options.activation]

  @property
  def use_bias(self) -> bool:
    """Whether the products with w_in and w_out add a bias."""
    bias = self.options.bias
    return self.shared.use_bias if not bias else bias == 'all'

  @property
  def gate_bias(self) -> bool:
    """Whether the products of a gate add a bias, besides those with w_in."""
    return self.activation.gated and self.options.bias == 'all'

  def parameters(
    self,
    module: nn.Module,
    stack: tuple[int, ...],
    width: int,
    kernel: Initializer | None = None,
  ) -> dict[str, Any]:
    """Makes the parameters of the layer, by name, each [*stack, ...].

    The parameters are w_in, w_out, w_gate and w_factor if the activation has
    them, b_in and b_out if `use_bias`, and b_gate and b_factor if `gate_bias`.

    Args:
      module: The module that the parameters belong to.
      stack: The sizes of the leading dimensions; () for a single layer.
      width: M, the width of the layer's input.
      kernel: The initialiser of kernels. Default: the model's.
    """
    shared, role, p = self.shared, self.role, {}
    for name, (shape, axes, form) in self.specs(stack, width).items():
      if form == 'bias':
        init = parameters.bias(axes, role=role)
      else:
        is_last = form == 'residual'
        init = kernel or parameters.kernel(
          shared, axes, role=role, residual=is_last
        )
      p[name] = module.param(name, init, shape, shared.param_dtype)
    return p

  def sizes(self, width: int, dtype: jnp.dtype) -> Sizes:
    """The sizes of an expert that the cost model of exchanges asks for.

    Rows of width M = `width` travel to the expert in the type `dtype`.
    """
    kernels = len(self.first_kernels) + 1
    row = jnp.dtype(dtype).itemsize
    parameter = jnp.dtype(self.shared.param_dtype).itemsize
    return Sizes(width, self.options.hidden, row, kernels, parameter)

  def axes(self, stack: tuple[int, ...], width: int) -> dict[str, Names]:
    """The logical axes of each parameter of the layer, by name.

    `stack` has the sizes of leading dimensions, (E,) for E experts; () for a
    single layer. `width` is M.
    """
    return {name: p[1] for name, p in self.specs(stack, width).items()}

  def specs(
    self, stack: tuple[int, ...], width: int
  ) -> dict[str, tuple[tuple[int, ...], Names, str]]:
    """The shape, logical axes and form of each parameter, by name.

    The order is that in which initial values are drawn. The form is
    'kernel', 'bias', or 'residual' for a kernel whose product is added to the
    residual stream.

    Args:
      stack: The sizes of the leading dimensions, (E,) for E experts; () for a
        single layer.
      width: M, the width of the layer's input.
    """
    M, F = width, self.options.hidden
    mlp = 'expert_mlp' if stack else 'mlp'
    specs: dict[str, tuple[tuple[int, ...], Names, str]] = {}
    for name in sorted(self.first_kernels, key=lambda name: name != 'w_in'):
      specs[name] = ((M, F), ('embed', mlp), 'kernel')
      if self.use_bias if name == 'w_in' else self.gate_bias:
        specs[f'b{name[1:]}'] = ((F,), (mlp,), 'bias')
    specs['w_out'] = ((F, M), (mlp, 'embed'), 'residual')
    if self.use_bias:
      specs['b_out'] = ((M,), ('embed',), 'bias')
    experts = ('expert',) * len(stack)
    return {
      name: ((*stack, *shape), (*experts, *axes), form)
      for name, (shape, axes, form) in specs.items()
    }

  @property
  def first_kernels(self) -> tuple[str, ...]:
    """Names of the kernels that multiply x, in the order of their products."""
    return self.activation.kernels

  def compute(
    self,
    p: dict[str, Any],
    x: Float[Array, '*E R M'],
    dropout: Callable[[Array], Array] = lambda h: h,
    *,
    product: Callable[..., Array] = rows_matmul,
    add_bias: Callable[[Array, Array], Array] = lambda y, b: (
      y + b[..., None, :]
    ),
  ) -> Float[Array, '*E R M']:
    """The output of one layer for rows, or of E layers for E lists of rows.

    Args:
      p: The parameters by name, of one layer, or each [E, ...] of E layers.
      x: The R rows of the layer, or of each layer; a row is a token's vector.
      dropout: The function from hidden values [*E, R, F] to the same with some
        dropped; by default it drops none.
      product: The function product(rows, kernel) that multiplies them.
      add_bias: The function add_bias(products, bias) that returns their sum.
    """
    act, dtype = self.activation, self.shared.dtype

    def biased(y, name):
      return add_bias(y, p[name].astype(dtype)) if name in p else y

    x = x.astype(dtype)
    products = [
      checkpoint_name(biased(product(x, p[name]), f'b{name[1:]}'), HIDDEN)
      for name in self.first_kernels
    ]
    h = dropout(act.hidden(*products))
    y = product(h, p['w_out'])
    return biased(y, 'b_out')

  def compute_sorted(
    self,
    p: dict[str, Any],
    x: Float[Array, 'N M'],
    group_sizes: Int32[Array, ' E'],
    dropout_key: PRNGKey | None = None,
    backend: str = AUTO,
  ) -> Float[Array, 'N M']:
    """The outputs of E layers for rows that are sorted by layer.

    Args:
      p: The parameters of the layers, each [E, ...].
      x: The N rows of all layers, each the vector of a token. Rows after the
        last layer's have undefined outputs.
      group_sizes: The number of rows of each layer.
      dropout_key: The key of dropout; None: nothing is dropped.
      backend: The backend of the grouped products.
    """
    if not self.use_bias and dropout_key is None:
      w_ins = tuple(p[name] for name in self.first_kernels)
      hidden = self.activation.hidden
      return grouped_ffn(x, w_ins, p['w_out'], group_sizes, hidden, backend)

    def add_bias(y, b):
      return y + jnp.repeat(b, group_sizes, 0, total_repeat_length=len(y))

    return self.compute(
      p,
      x,
      product=lambda x, w: grouped_matmul(x, w, group_sizes, backend),
      add_bias=add_bias,
      dropout=lambda h: self.dropped(h, dropout_key),
    )

  def dropped(self, h: Array, key: PRNGKey | None) -> Array:
    """Hidden values after dropout: some are 0, and the others are scaled up.

    The key decides which values are dropped; None drops nothing.
    """
    if key is None:
      return h
    keep_rate = 1 - self.dropout
    keep_mask = jax.random.bernoulli(key, keep_rate, h.shape)
    return jnp.where(keep_mask, h / keep_rate, 0)

  def dropout_module(self, module: nn.Module, train: bool) -> nn.Dropout:
    """The module that drops hidden values in training, a child of `module`."""
    return nn.Dropout(self.dropout, deterministic=not train, parent=module)


class FeedForward(nn.Module):
  """x -> activation(x W_in) W_out, or (activation(x W_gate) * x W_in) W_out.

  Attributes:
    options: The width and activation of the layer.
    shared: The settings that all layers of the model share.
    dropout: The rate at which hidden values are dropped in training.
    role: The part of the model that the parameters belong to, such as 'ffn'.
    depth: The number of hidden layers, all of the same width; for more than one
      the activation must not be gated.
  """

  options: FfnOptions
  shared: Shared = Shared()
  dropout: float = 0.0
  role: str = 'ffn'
  depth: int = 1

  @nn.compact
  @checked
  def __call__(
    self, x: Float[Array, '... M'], train: bool = False
  ) -> Float[Array, '... M']:
    """Applies the layer to every token; dropout only if `train`."""
    layer = FfnLayer(self.options, self.shared, self.dropout, self.role)
    if self.depth > 1 and layer.activation.gated:
      raise InputError(
        f'depth={self.depth} with activation={self.options.activation!r}: '
        'several hidden layers need an activation without gate'
      )
    rows = x.reshape(-1, x.shape[-1])  # see kernels/cpu.py
    M = rows.shape[-1]
    p = layer.parameters(self, (), M)

    def after_first(h):
      h = layer.dropout_module(self, train)(h)
      for i in range(1, self.depth):
        h = layer.activation.hidden(self._hidden_product(h, i, layer.use_bias))
        h = layer.dropout_module(self, train)(h)
      return h

    return layer.compute(p, rows, after_first).reshape(x.shape)

  def _hidden_product(self, h, i, use_bias):
    """The product [N, F] of N tokens' hidden values h with a kernel, layer i's.

    i counts hidden layers from 0, and is at least 1 here. A bias is added if
    `use_bias`.
    """
    shared, F = self.shared, self.options.hidden
    init = parameters.kernel(shared, ('mlp', None), role=self.role)
    w = self.param(f'w_hidden_{i}', init, (F, F), shared.param_dtype)
    y = rows_matmul(h, w)
    if use_bias:
      init = parameters.bias((None,), role=self.role)
      b = self.param(f'b_hidden_{i}', init, (F,), shared.param_dtype)
      y = y + b.astype(shared.dtype)[None]
    return y
