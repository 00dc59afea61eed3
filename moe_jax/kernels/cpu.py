"""Code that exists only for XLA's CPU compiler, with the reasons.

Other platforms compile the usual JAX functions at least as well; none of this
changes a number by more than rounding. More code for that compiler is:

- the backend 'blocks' of grouped products (`blocks.py`);
- attention by blocks of queries (`layers/attention/blockwise.py`);
- experts that serve few tokens (`layers/experts/few_tokens.py`), and layers
  whose parameters (`models/decoding.py`) and caches
  (`layers/attention/cache.py`) are not stacked in decoding: the compiler copies
  what it slices out of a stack;
- `prevent_cse` where layers are not in a loop (`models/stack.py`): the compiler
  would merge a layer with its recomputation, and keep what remat drops;
- rows of `[B * T, M]` in place of `[B, T, M]` before products with kernels: a
  kernel's gradient then contracts one dimension, as a matrix product does; to
  contract two, the compiler copies the rows.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.shapes import Array, Float, Float32

# Up to this number of tokens, `few_tokens.py` multiplies all of them by each
# expert in use, as reading kernels then takes all the time, and sorts nothing.
FEW_TOKENS = 16
# The largest number of experts, over all layers, that may have arrays of their
# own: each of them adds a branch to the compiled program.
MOST_UNROLLED = 512


def sum_over_rows(
  x: Float[Array, '*E R M'],
  dy: Float[Array, '*E R F'],
  precision: jax.lax.Precision | None = None,
) -> Float32[Array, '*E M F']:
  """x^T dy in float32, the gradient of a kernel."""
  R, M, F = *x.shape[-2:], dy.shape[-1]
  if is_swapped(R, M, F):
    return product_over_rows(dy, x, precision).swapaxes(-1, -2)
  return product_over_rows(x, dy, precision)


def is_swapped(num_rows: int, width: int, d_width: int) -> bool:
  """Whether a kernel's gradient is the transpose of dy^T x, and not x^T dy.

  That is so if it transposes fewer values, as x is wide. The compiler's loop
  over a transpose reads one value of each cache line, so that a wide one takes
  longer than the product.

  Args:
    num_rows: The number of rows of x and dy.
    width: The width of x.
    d_width: The width of dy.
  """
  return (num_rows + width) * d_width < num_rows * width


def product_over_rows(
  x: Float[Array, '*E R M'],
  dy: Float[Array, '*E R F'],
  precision: jax.lax.Precision | None = None,
) -> Float32[Array, '*E M F']:
  """x^T dy in float32, in which x^T is an array of its own.

  The compiler multiplies such an array faster than a transpose that it has
  folded into the product. The result is not folded into what follows, either.
  """
  alone = jax.lax.optimization_barrier(x.swapaxes(-1, -2))
  product = jnp.matmul(
    alone, dy, precision=precision, preferred_element_type=jnp.float32
  )
  return jax.lax.optimization_barrier(product)


def gelu(x: Float[Array, '*N']) -> Float[Array, '*N']:
  """The exact GELU by erf: `jax.nn.gelu` takes twice as long, by erfc."""
  return 0.5 * x * (1.0 + jax.lax.erf(x * float(np.sqrt(0.5))))


@jax.custom_vjp
def add_to_each(
  x: Float32[Array, 'B *N'], bias: Float32[Array, '*N']
) -> Float32[Array, 'B *N']:
  """x + bias; the gradient of the bias is computed as a product with ones.

  The compiler takes four times as long for a sum over the leading axis.
  """
  return x + bias[None]


def _add_to_each_forward(x, bias):
  return add_to_each(x, bias), None


def _add_to_each_backward(_, d_sum):
  B, *shape = d_sum.shape
  ones = jnp.ones((1, B), d_sum.dtype)
  return d_sum, (ones @ d_sum.reshape(B, -1)).reshape(shape)


add_to_each.defvjp(_add_to_each_forward, _add_to_each_backward)


def most_are_chosen(choosers: int, num_selected: int, num_experts: int) -> bool:
  """Whether `choosers` with K uniform choices each choose most of the experts.

  The choosers are tokens, or tasks where the tokens of a task choose alike. If
  they choose most experts, a decoding step multiplies all tokens by all
  experts; if not, experts have arrays of their own, and the arrays of experts
  that no token chose are not read.
  """
  return (1 - num_selected / num_experts) ** choosers < 0.5
