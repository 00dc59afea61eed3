"""Products of a sparse layer in 8-bit floats, emulated by rounding operands.

Operands are rounded to numbers that an 8-bit float times a scale can have, and
multiplied in float32. A product and both products of its gradient round their
own operands, as kernels for such floats do: a scale is shared along the axis
that a product sums over, and the gradients sum over other axes; in a kernel's
gradient the rows of all experts share it. Rounding itself has the gradient of
the identity.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from moe_jax.config import Options, option
from moe_jax.kernels import grouped_matmul
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.experts import FeedForwardExpert
from moe_jax.layers.ffn import FfnLayer
from moe_jax.layers.routers import steps
from moe_jax.layers.routers.token_choice import TokenChoice, TokenChoiceRouter
from moe_jax.shapes import Array

FLOAT_TYPES = {'e4m3': jnp.float8_e4m3fn, 'e5m2': jnp.float8_e5m2}
TILE = 128  # numbers along a side of a tile in DeepSeek-V3
# What is rounded in experts: products, by the names of their kernels, and the
# two ways of rows between tokens and experts.
PRODUCTS = {'gate': 'w_gate', 'up': 'w_in', 'down': 'w_out'}
PRODUCTS |= {wire: wire for wire in ('dispatch', 'combine')}


def rounded(x: Array, float_type: str, sizes: Sequence[int]) -> Array:
  """The nearest numbers of a type, whose largest is the largest of a block.

  Args:
    x: The numbers. A block of zeros stays as it is.
    float_type: A name in `FLOAT_TYPES`.
    sizes: Size of a block along each axis; a size that does not divide the
      axis, such as 0, takes the whole axis.
  """
  shape = []
  for n, size in zip(x.shape, sizes, strict=True):
    size = n if not size or n % size else size
    shape += [n // size, size]
  blocks, to = x.reshape(shape), FLOAT_TYPES[float_type]
  inside = tuple(range(1, len(shape), 2))
  largest = jnp.abs(blocks).max(inside, keepdims=True)
  scale = jnp.where(largest > 0, largest / float(jnp.finfo(to).max), 1.0)
  return ((blocks / scale).astype(to).astype(x.dtype) * scale).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _instead(gradients, y, *others):
  """Returns y; its gradient goes to `others`, by a function for each."""
  return y


def _instead_forward(gradients, y, *others):
  return _instead(gradients, y, *others), None


def _instead_backward(gradients, _, dy):
  return jnp.zeros_like(dy), *(gradient(dy) for gradient in gradients)


_instead.defvjp(_instead_forward, _instead_backward)


@dataclasses.dataclass(frozen=True)
class Rounding(Options):
  """How operands are rounded; as in DeepSeek-V3, if nothing is changed."""

  float_type: str = option(
    'e4m3',
    'Type of operands, named after the bits of its exponent and mantissa.',
    choices=FLOAT_TYPES,
  )
  scaling: str = option(
    'tile',
    "Numbers with one scale: 'tensor', all of an operand; 'row', those of one "
    "sum of the product; 'tile', 128 of these, and 128 x 128 of a kernel.",
    choices=('tensor', 'row', 'tile'),
  )

  def __call__(self, x: Array, axis: int, is_kernel: bool = False) -> Array:
    """The operand x, rounded for a product that sums over an axis of it."""
    sizes = [0 if self.scaling == 'tensor' else 1] * x.ndim
    if self.scaling == 'tile' and is_kernel:
      sizes[-2:] = TILE, TILE
    else:
      sizes[axis] = TILE if self.scaling == 'tile' else 0
    return rounded(x, self.float_type, sizes)

  def product(
    self, multiply: Callable[[Array, Array], Array], x: Array, w: Array
  ) -> Array:
    """multiply(x, w) of rounded operands, with gradients of rounded ones.

    The compiler removes the two products of which the gradient alone is used.

    Args:
      multiply: The product of rows by kernels.
      x: The rows, [..., N, M].
      w: The kernels, [..., M, F].
    """
    by_row = functools.partial(self, axis=-1)
    by_column = functools.partial(self, axis=-2)
    fixed = jax.lax.stop_gradient
    y = multiply(by_row(fixed(x)), by_column(fixed(w), is_kernel=True))
    to_x = multiply(x, by_row(fixed(w), is_kernel=True))
    to_w = multiply(by_column(fixed(x)), w)
    return _instead((by_row, by_column), y, to_x, to_w)

  def sent(self, x: Array, ahead: bool, back: bool) -> Array:
    """Rows on a wire.

    Args:
      x: The rows.
      ahead: Whether they are rounded.
      back: Whether their gradient is.
    """
    by_row = functools.partial(self, axis=-1)
    gradient = by_row if back else lambda dy: dy
    return _instead((gradient,), by_row(x) if ahead else x, x)


@dataclasses.dataclass(frozen=True)
class Float8Layer(FfnLayer):
  """A feed-forward of which some products and wires are rounded.

  Attributes:
    rounding: The rounding.
    products: Names of the kernels and wires that are rounded.
  """

  rounding: Rounding = Rounding()
  products: Sequence[str] = ()

  def compute(self, p, x, *dropout, product=rows_matmul, **how):
    ahead, back = 'dispatch' in self.products, 'combine' in self.products

    def multiply(x, named_kernel, **options):
      name, w = named_kernel
      exact = functools.partial(product, **options)
      own = functools.partial(self.rounding.product, exact)
      return own(x, w) if name in self.products else exact(x, w)

    named = {k: (k, w) if k.startswith('w_') else w for k, w in p.items()}
    x = self.rounding.sent(x.astype(self.shared.dtype), ahead, back)
    y = super().compute(named, x, *dropout, product=multiply, **how)
    return self.rounding.sent(y, back, ahead)

  def compute_sorted(self, p, x, group_sizes, dropout_key=None, backend='auto'):
    if not self.products or self.use_bias or dropout_key is not None:
      return super().compute_sorted(p, x, group_sizes, dropout_key, backend)

    def product(x, w, **_):  # a plain layer fuses all three, of equal values
      return grouped_matmul(x, w, group_sizes, backend)

    return self.compute(p, x, product=product)


@dataclasses.dataclass(frozen=True)
class Float8Expert(FeedForwardExpert):
  """Options of experts of which some products and wires are rounded."""

  products: str = option(
    'gate up down dispatch',
    'What is rounded: the products gate, up and down; dispatch, rows and their '
    'gradients on the way to experts; combine, both on the way back.',
  )
  rounding: Rounding = option(Rounding(), 'How it is rounded.')

  def ffn(self, shared):
    plain = super().ffn(shared)
    names = tuple(PRODUCTS[name] for name in self.products.split())
    return Float8Layer(**vars(plain), rounding=self.rounding, products=names)


@dataclasses.dataclass(frozen=True)
class Float8TokenChoice(TokenChoice):
  """Options of token choice whose product is rounded, with no bias or noise."""

  rounding: Rounding = option(Rounding(), 'How the product is rounded.')

  def problems(self):
    yield from super().problems()
    names = 'jitter', 'use_bias', 'input_dropout', 'logits_dtype'
    yield from self.in_vain('where the product is rounded', *names)

  def module(self, sizes, shared, name=None):
    return Float8Router(self, sizes, shared, name=name)


class Float8Router(TokenChoiceRouter):
  """The module of `Float8TokenChoice`."""

  options: Float8TokenChoice

  def logits(self, x, train):
    init = parameters.kernel(self.shared, steps.AXES, role=steps.ROLE)
    shape = x.shape[-1], self.sizes.num_experts
    w = self.param('w', init, shape, jnp.float32)
    exact = functools.partial(rows_matmul, precision=jax.lax.Precision.HIGHEST)
    rows = x.reshape(-1, len(w)).astype(jnp.float32)
    logits = self.options.rounding.product(exact, rows, w)
    return logits.reshape(*x.shape[:-1], -1)
