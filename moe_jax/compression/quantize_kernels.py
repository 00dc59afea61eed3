"""Rounding of the kernels of one layer, with the errors of both methods."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.compression import gptq, grids
from moe_jax.compression.grids import Rounded
from moe_jax.compression.kernel_inputs import Rows
from moe_jax.layers.ffn import FfnLayer
from moe_jax.layers.kernel_format import KernelFormat
from moe_jax.shapes import Array, Float, Float32, Leaf


class Outcome(NamedTuple):
  """Some kernels on a grid, and the errors of both methods.

  Attributes:
    rounded: The kernels, as the chosen method rounds them.
    rtn: float32 [E], tr((W - Q) H (W - Q)^T) of rounding to the nearest value.
    gptq: float32 [E], the same error of rounding by GPTQ.
    total: float32 [E], tr(W H W^T).
    plain: bool [E], whether GPTQ took the identity for H.
  """

  rounded: Rounded
  rtn: Leaf
  gptq: Leaf
  total: Leaf
  plain: Leaf


@functools.partial(jax.jit, static_argnames='format')
def to_nearest(w: Float[Array, 'E I O'], format: KernelFormat) -> Outcome:
  """Rounds to the nearest value; errors are squares of weights, as with H = I.

  Both methods then do the same.
  """
  rounded = grids.nearest(w, grids.of_format(w, format))
  w = w.astype(jnp.float32)
  error = jnp.square(w - rounded.values).sum((-2, -1))
  total = jnp.square(w).sum((-2, -1))
  return Outcome(rounded, error, error, total, jnp.ones(len(w), bool))


@functools.partial(jax.jit, static_argnames='format')
def compensated(
  w: Float[Array, 'E I O'],
  hessian: Float32[Array, 'E I I'],
  format: KernelFormat,
) -> Outcome:
  """Rounds by GPTQ."""
  grid = grids.of_format(w, format)
  factor = gptq.factor(hessian)
  rounded = gptq.gptq(w, grid, factor)
  nearest = grids.nearest(w, grid)
  return Outcome(
    rounded,
    gptq.error(w, nearest.values, hessian),
    gptq.error(w, rounded.values, hessian),
    gptq.error(w, jnp.zeros_like(w), hessian),
    factor.plain,
  )


@functools.partial(jax.jit, static_argnames=('layer', 'format'))
def feed_forwards(
  layer: FfnLayer, p: dict[str, Any], rows: Rows, format: KernelFormat
) -> dict[str, Outcome]:
  """Rounds the kernels of feed-forward layers by GPTQ.

  The last kernel's inputs are the hidden values that the rounded first kernels
  give.

  Args:
    layer: The computation of one layer.
    p: The parameters of the layers, each [E, ...].
    rows: The inputs of the layers.
    format: The format that kernels get.
  """
  p, hessian = dict(p), gptq.hessian(*rows)
  outcomes = {}
  for name in layer.first_kernels:
    outcomes[name] = compensated(p[name], hessian, format)
    p[name] = outcomes[name].rounded.values
  hidden = []
  layer.compute_stacked(p, rows.x, lambda h: hidden.append(h) or h)
  hessian = gptq.hessian(hidden[0], rows.filled)
  outcomes['w_out'] = compensated(p['w_out'], hessian, format)
  return outcomes


def joined(outcomes: Iterable[Outcome]) -> Outcome:
  """The outcome of all experts, joined from those of groups, on the host."""
  on_host = [jax.tree.map(np.asarray, outcome) for outcome in outcomes]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *on_host)
