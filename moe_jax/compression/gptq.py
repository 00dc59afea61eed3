"""GPTQ: rounding of kernels that takes account of the kernels' inputs.

The method is GPTQ's, https://arxiv.org/abs/2210.17323. Damping, the fallback to
the nearest value and experts without tokens are treated as in QMoE,
https://arxiv.org/abs/2310.16795. A kernel is [*E, I, O], for I inputs and O
output units; in formulas W and its rounded Q are as in the papers, [O, I], and
H, [I, I], is the Hessian X^T X of the inputs X of the kernel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.compression.calibration import Rows
from moe_jax.kernels.kernel_format import Grid, KernelFormat
from moe_jax.layers.ffn import FfnLayer
from moe_jax.shapes import Array, Bool, Float, Float32, Int8, UInt8, checked

# The share of the mean of the Hessian's diagonal that is added to the diagonal,
# and the least number that is added, so that a Hessian of few tokens, which is
# singular, has an inverse.
DAMPING, LEAST_DAMPING = 0.1, 1e-6
# The number of inputs whose errors are passed on to later inputs together.
BLOCK = 128
_EXACT = jax.lax.Precision.HIGHEST


class Factor(NamedTuple):
  """The triangular factors of the inverses of Hessians H, which rounding reads.

  H is the Hessian of a kernel's I inputs, with damping.

  Attributes:
    upper: float32 [*E, I, I], the upper triangular U with inverse(H) = U^T U;
      the identity where H has no such factor.
    plain: bool [*E], whether `upper` is the identity, because H is zero or has
      no factor, so that weights are rounded to the nearest value.
  """

  upper: Array
  plain: Bool[Array, '*E']


@checked
def hessian(
  x: Float[Array, '*E R I'], counted: Bool[Array, '*E R']
) -> Float32[Array, '*E I I']:
  """X^T X of each kernel's R rows of I inputs, over the rows that count."""
  x = jnp.where(counted[..., None], x, 0).astype(jnp.float32)
  return jnp.matmul(x.swapaxes(-1, -2), x, precision=_EXACT)


@checked
def factor(h: Float32[Array, '*E I I']) -> Factor:
  """The factor of the damped inverse of each Hessian.

  The factor is the identity where the Hessian is zero, as for an expert without
  tokens, or where the factorisation fails.
  """
  size = h.shape[-1]
  identity = jnp.broadcast_to(jnp.eye(size), h.shape)
  diagonal = jnp.diagonal(h, axis1=-2, axis2=-1).mean(-1)[..., None, None]
  damped = h + identity * jnp.maximum(DAMPING * diagonal, LEAST_DAMPING)
  # The lower factor of H with rows and columns in reverse order is, reversed
  # again, an upper R with H = R R^T. So inverse(H) = U^T U for U = inverse(R).
  lower = jnp.linalg.cholesky(damped[..., ::-1, ::-1])
  upper = jax.scipy.linalg.solve_triangular(lower[..., ::-1, ::-1], identity)
  fails = ~jnp.isfinite(upper).all((-2, -1))
  plain = fails | (h == 0).all((-2, -1))
  return Factor(jnp.where(plain[..., None, None], identity, upper), plain)


@checked
def gptq(
  w: Float[Array, '*E I O'], format: KernelFormat, grid: Grid, factor: Factor
) -> Int8[Array, '*E I O'] | UInt8[Array, '*E I O']:
  """Rounds weights input by input; those of later inputs make up for errors.

  `grid` says which number each code of `format` stands for; `factor` is made of
  the Hessians of the kernels' inputs. Where the factor is the identity, weights
  are rounded to the nearest value, bit for bit.

  Returns:
    The integer codes of the weights on `grid`, which does not change.
  """
  sweep = functools.partial(_sweep, format)
  for _ in range(w.ndim - 2):
    sweep = jax.vmap(sweep)
  return sweep(w.astype(jnp.float32), grid, factor.upper)


def _sweep(format, w, grid, upper):
  """The integer codes of one kernel w, float32 [I, O], rounded by GPTQ.

  `format` and `grid` are those of the codes; `upper`, [I, I], is the factor of
  the inverse Hessian of the kernel's inputs.
  """
  inputs, units = w.shape
  block = min(BLOCK, inputs)
  padding = -inputs % block
  w = jnp.pad(w, ((0, padding), (0, 0)))
  upper = jnp.pad(upper, ((0, padding), (0, padding)))
  # Inputs that are padding get the factor 1, as errors are divided by factors.
  upper = upper + jnp.diag((jnp.arange(len(w)) >= inputs).astype(jnp.float32))

  def one_input(rows, i, block_factor):
    row = jax.lax.dynamic_slice_in_dim(rows, i, 1)
    codes = format.codes(row, grid)
    factors = block_factor[i]
    error = (row - format.values(codes, grid)) / factors[i]
    return rows - factors[:, None] * error, (codes[0], error[0])

  def one_block(w, first):
    rows = jax.lax.dynamic_slice_in_dim(w, first, block)
    ahead = jax.lax.dynamic_slice_in_dim(upper, first, block)  # [block, I]
    block_factor = jax.lax.dynamic_slice_in_dim(ahead, first, block, 1)
    step = functools.partial(one_input, block_factor=block_factor)
    _, (codes, errors) = jax.lax.scan(step, rows, jnp.arange(block))
    return w - jnp.matmul(ahead.T, errors, precision=_EXACT), codes

  starts = jnp.arange(0, len(w), block)
  _, codes = jax.lax.scan(one_block, w, starts)
  return codes.reshape(-1, units)[:inputs]


@checked
def error(
  w: Float[Array, '*E I O'],
  values: Float[Array, '*E I O'],
  h: Float32[Array, '*E I I'],
) -> Float32[Array, '*E']:
  """tr((W - Q) H (W - Q)^T): the squared change of the outputs of each kernel.

  Args:
    w: The kernels.
    values: The kernels after rounding.
    h: The Hessians of the kernels' inputs, undamped.
  """
  change = w.astype(jnp.float32) - values
  weighted_change = jnp.matmul(h, change, precision=_EXACT)
  return (change * weighted_change).sum((-2, -1))


class Outcome(NamedTuple):
  """Some quantised kernels, and the errors of GPTQ and of nearest rounding.

  An error is tr((W - Q) H (W - Q)^T), the squared change of a kernel's outputs
  by rounding W to Q, for the Hessian H of its inputs.

  Attributes:
    codes: uint8 or int8 [E, I, O], the integer codes of the kernels, as the
      chosen method rounds them.
    grid: The grid of values that the codes point to.
    values: float32 [E, I, O], the values that the codes stand for.
    rtn: float32 [E], the error of rounding to the nearest value.
    gptq: float32 [E], the error of rounding by GPTQ.
    total: float32 [E], tr(W H W^T), the squared outputs.
    plain: bool [E], whether GPTQ took the identity for H.
  """

  codes: Any
  grid: Any
  values: Any
  rtn: Any
  gptq: Any
  total: Any
  plain: Any


@functools.partial(jax.jit, static_argnames='format')
def to_nearest(w: Float[Array, 'E I O'], format: KernelFormat) -> Outcome:
  """Rounds to the nearest value; errors are squared changes of weights.

  These are the errors for the identity as the Hessian of the inputs, with which
  GPTQ, too, rounds to the nearest value, so that `rtn` and `gptq` are equal.
  """
  grid = format.grid(w)
  codes = format.codes(w, grid)
  values = format.values(codes, grid)
  w = w.astype(jnp.float32)
  change = jnp.square(w - values).sum((-2, -1))
  total = jnp.square(w).sum((-2, -1))
  plain = jnp.zeros(len(w), bool)
  return Outcome(codes, grid, values, change, change, total, plain)


def _compensated(
  w: Float[Array, 'E I O'], h: Float32[Array, 'E I I'], format: KernelFormat
) -> Outcome:
  """Rounds kernels by GPTQ, for the Hessians h of their inputs."""
  grid, inverse = format.grid(w), factor(h)
  codes = gptq(w, format, grid, inverse)
  values = format.values(codes, grid)
  nearest = format.values(format.codes(w, grid), grid)
  rtn, own, total = (
    error(w, x, h) for x in (nearest, values, jnp.zeros_like(w))
  )
  return Outcome(codes, grid, values, rtn, own, total, inverse.plain)


@functools.partial(jax.jit, static_argnames=('layer', 'format'))
def feed_forwards(
  layer: FfnLayer, p: dict[str, Any], rows: Rows, format: KernelFormat
) -> dict[str, Outcome]:
  """Rounds the kernels of feed-forward layers by GPTQ.

  The last kernel's inputs are the hidden values computed with the first kernels
  after these are rounded.

  Args:
    layer: The computation of one feed-forward.
    p: The parameters of the E feed-forwards, each [E, ...].
    rows: The inputs of the feed-forwards.
    format: The format of the quantised kernels.

  Returns:
    The outcome of each kernel by its name, such as 'w_in' and 'w_out'.
  """
  p, h = dict(p), hessian(*rows)
  outcomes = {}
  for name in layer.first_kernels:
    outcomes[name] = _compensated(p[name], h, format)
    p[name] = outcomes[name].values
  hidden = []
  layer.compute(p, rows.x, lambda x: hidden.append(x) or x)
  h = hessian(hidden[0], rows.filled)
  outcomes['w_out'] = _compensated(p['w_out'], h, format)
  return outcomes
