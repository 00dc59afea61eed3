"""The dense feed-forward layer, and the activations experts share with it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from moe_jax.kernels import cpu
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.parameters import Names
from moe_jax.layers.shared import Shared
from moe_jax.options import Options, at_least, one_of, option, unknown
from moe_jax.shapes import Array, Float


class Activation(NamedTuple):
  """An elementwise function, and whether a second product gates it.

  Attributes:
    function: The elementwise function.
    gated: Whether the hidden values are function(x W_gate) * x W_in.
    cheap: Whether XLA computes it again rather than read its result.
    kept: How many arrays as wide as the hidden values the forward pass keeps
      for the backward pass, the products among them.
  """

  function: Callable[[Array], Array]
  gated: bool
  cheap: bool = False
  kept: int = 4

  def hidden(self, *products: Array) -> Array:
    """The hidden values of x W_in, or of x W_gate and x W_in."""
    first, *rest = products
    h = self.function(first)
    return h * rest[0] if rest else h


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
  'relu': Activation(jax.nn.relu, False, cheap=True, kept=1),
  'gelu': Activation(cpu.gelu, False),
  'gelu_tanh': Activation(_gelu_tanh, False, kept=6),
  'geglu': Activation(_gelu_tanh, True, kept=8),  # arXiv:2002.05202
  'swiglu': Activation(jax.nn.silu, True, kept=6),
}


def activation(name: str) -> Activation:
  """The activation of that name; ValueError names those that exist."""
  if name not in ACTIVATIONS:
    raise unknown('activation', name, ACTIVATIONS)
  return ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class FfnOptions(Options):
  """A feed-forward layer M -> F -> M."""

  hidden: int = option(512, 'Width F of the hidden layer.', at_least(1))
  activation: str = option(
    'gelu',
    'Function between the two products; geglu and swiglu have a third kernel, '
    'whose product gates the hidden values.',
    one_of(*ACTIVATIONS),
  )

  def shrunk(self) -> 'FfnOptions':
    """See `Options.shrunk`."""
    return dataclasses.replace(self, hidden=48)


@dataclasses.dataclass(frozen=True)
class FfnLayer:
  """A feed-forward layer as it is computed, alone or as each of E experts.

  Attributes:
    options: Its width and activation.
    shared: What the layers of the model share.
    dropout: The rate at which hidden values are dropped in training.
    role: The role of its parameters.
  """

  options: FfnOptions
  shared: Shared = Shared()
  dropout: float = 0.0
  role: str = 'ffn'

  @property
  def activation(self) -> Activation:
    """The function between the two products."""
    return activation(self.options.activation)

  def parameters(
    self, module: nn.Module, stack: tuple[int, ...], width: int
  ) -> dict[str, Any]:
    """`module`'s w_in, w_gate where the activation gates, w_out; b_in, b_out.

    Each is [*stack, ...]; the biases only where there are any.
    """
    shared = self.shared
    p = {}
    for name, (shape, axes, form) in self._parts(stack, width).items():
      if form == 'bias':
        init = parameters.bias(axes, role=self.role)
      else:
        init = parameters.kernel(
          shared, axes, role=self.role, residual=form == 'residual'
        )
      p[name] = module.param(name, init, shape, shared.param_dtype)
    return p

  def axes(self, stack: tuple[int, ...], width: int) -> dict[str, Names]:
    """The logical axes of `parameters`."""
    return {name: p[1] for name, p in self._parts(stack, width).items()}

  def _parts(self, stack, width):
    """The shape, axes and form of each parameter, in the order of their draws.

    The form 'residual' is a kernel whose product is added to the residual.
    """
    M, F = width, self.options.hidden
    mlp = 'expert_mlp' if stack else 'mlp'
    parts = {'w_in': ((M, F), ('embed', mlp), 'kernel')}
    if self.shared.use_bias:
      parts['b_in'] = ((F,), (mlp,), 'bias')
    if self.activation.gated:
      parts['w_gate'] = ((M, F), ('embed', mlp), 'kernel')
    parts['w_out'] = ((F, M), (mlp, 'embed'), 'residual')
    if self.shared.use_bias:
      parts['b_out'] = ((M,), ('embed',), 'bias')
    experts = ('expert',) * len(stack)
    return {
      name: ((*stack, *shape), (*experts, *axes), form)
      for name, (shape, axes, form) in parts.items()
    }

  def kernels(self, p: dict[str, Any]) -> tuple[tuple[Array, ...], Array]:
    """The first kernels, in the order of `Activation.hidden`, and the last."""
    return tuple(p[name] for name in self._first_kernels), p['w_out']

  @property
  def _first_kernels(self) -> tuple[str, ...]:
    """The kernels that x meets, in the order that `Activation.hidden` takes."""
    return ('w_gate', 'w_in') if self.activation.gated else ('w_in',)

  def compute(
    self,
    p: dict[str, Any],
    x: Float[Array, '*E R M'],
    *,
    product: Callable[..., Array],
    add_bias: Callable[[Array, Array], Array],
    dropout: Callable[[Array], Array],
  ) -> Float[Array, '*E R M']:
    """The layer, of whatever a product with kernels is.

    Args:
      p: Its parameters.
      x: Rows, of the type of products.
      product: product(rows, kernel, transposed_alone=...).
      add_bias: add_bias(products, bias).
      dropout: Drops hidden values.
    """
    act, dtype = self.activation, self.shared.dtype
    products = [product(x, p[name]) for name in self._first_kernels]
    if self.shared.use_bias:
      products[-1] = add_bias(products[-1], p['b_in'].astype(dtype))
    h = dropout(act.hidden(*products))
    y = product(h, p['w_out'], transposed_alone=not act.cheap)
    return add_bias(y, p['b_out'].astype(dtype)) if self.shared.use_bias else y

  def compute_stacked(
    self,
    p: dict[str, Any],
    x: Float[Array, '*E R M'],
    dropout: Callable[[Array], Array] = lambda h: h,
  ) -> Float[Array, '*E R M']:
    """One layer on rows, or E of them on E lists of rows."""
    return self.compute(
      p,
      x.astype(self.shared.dtype),
      product=rows_matmul,
      add_bias=lambda y, b: y + b[..., None, :],
      dropout=dropout,
    )

  def dropped(self, module: nn.Module, train: bool) -> nn.Dropout:
    """The dropout of hidden values, as a submodule of `module`."""
    return nn.Dropout(self.dropout, deterministic=not train, parent=module)


class FeedForward(nn.Module):
  """x -> activation(x W_in) W_out, or (activation(x W_gate) * x W_in) W_out.

  Attributes:
    options: Width and activation.
    shared: What the layers of the model share.
    dropout: The rate at which hidden values are dropped in training.
    role: The role of its parameters, which the parent gives.
  """

  options: FfnOptions
  shared: Shared = Shared()
  dropout: float = 0.0
  role: str = 'ffn'

  @nn.compact
  def __call__(
    self, x: Float[Array, '... M'], train: bool = False
  ) -> Float[Array, '... M']:
    """Applies the layer to every token; dropout only if `train`."""
    layer = FfnLayer(self.options, self.shared, self.dropout, self.role)
    rows = x.reshape(-1, x.shape[-1])  # see kernels/cpu.py
    p = layer.parameters(self, (), rows.shape[-1])
    y = layer.compute_stacked(p, rows, layer.dropped(self, train))
    return y.reshape(x.shape)


class DeepFeedForward(nn.Module):
  """A feed-forward layer with `depth` hidden layers of F: M -> F ... F -> M.

  At a depth of 1 it is `FeedForward`, parameters too.

  Attributes:
    options: Width of the hidden layers, and activation, which does not gate.
    depth: How many hidden layers there are.
    shared: What the layers of the model share.
    dropout: The rate at which hidden values are dropped in training.
    role: The role of its parameters, which the parent gives.
  """

  options: FfnOptions
  depth: int
  shared: Shared = Shared()
  dropout: float = 0.0
  role: str = 'ffn'

  @nn.compact
  def __call__(
    self, x: Float[Array, '... M'], train: bool = False
  ) -> Float[Array, '... M']:
    """Applies the layer to every token; dropout only if `train`."""
    shared, F = self.shared, self.options.hidden
    layer = FfnLayer(self.options, shared, self.dropout, self.role)
    if layer.activation.gated or self.depth < 1:
      raise ValueError(
        f'depth={self.depth} with activation={self.options.activation!r}: a '
        'deep feed-forward has a depth of at least 1 and an activation without '
        'gate'
      )
    rows = x.reshape(-1, x.shape[-1]).astype(shared.dtype)
    p = layer.parameters(self, (), rows.shape[-1])

    def biased(y, bias):
      return y + bias.astype(shared.dtype)[None] if shared.use_bias else y

    def hidden(rows, w, bias):
      h = layer.activation.hidden(biased(rows_matmul(rows, w), bias))
      return nn.Dropout(self.dropout, deterministic=not train)(h)

    h = hidden(rows, p['w_in'], p.get('b_in'))
    for i in range(1, self.depth):
      init = parameters.kernel(shared, ('mlp', None), role=self.role)
      w = self.param(f'w_hidden_{i}', init, (F, F), shared.param_dtype)
      b = None
      if shared.use_bias:
        init = parameters.bias((None,), role=self.role)
        b = self.param(f'b_hidden_{i}', init, (F,), shared.param_dtype)
      h = hidden(h, w, b)
    y = biased(rows_matmul(h, p['w_out']), p.get('b_out'))
    return y.reshape(x.shape)
