"""Moving rows where experts choose: a token has any number of them.

The way from tokens to rows is a gather. The way back is a sum into tokens, a
scatter-add: its cost grows with the rows, where that of a list of each token's
rows would grow with the experts. Sums are float32.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.dispatch import permute
from moe_jax.shapes import Array, Float, Int32


def take_tokens(
  x: Float[Array, 'N M'], token: Int32[Array, '*R']
) -> Float[Array, '*R M']:
  """The token in each row; zero where its index is N."""
  return _take(x, token, len(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take(x, token, num_tokens):
  del num_tokens
  return permute.take_or_zero(x, token)


def _take_bwd(num_tokens, token, d_rows):
  return _sum(d_rows, token, num_tokens), None


_take.defvjp(lambda x, token, n: (_take(x, token, n), token), _take_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sum_rows(
  rows: Float[Array, '*R M'],
  gate: Float[Array, '*R'],
  token: Int32[Array, '*R'],
  num_tokens: int,
) -> Float[Array, 'N M']:
  """Each token's rows, weighted by the gates and summed.

  Args:
    rows: The outputs of the experts.
    gate: The gate of each row.
    token: The token in each row; N in an empty one.
    num_tokens: The number N of tokens.
  """
  weighted = gate[..., None].astype(rows.dtype) * rows
  return _sum(weighted, token, num_tokens)


def _sum_rows_fwd(rows, gate, token, num_tokens):
  return sum_rows(rows, gate, token, num_tokens), (rows, gate, token)


def _sum_rows_bwd(num_tokens, saved, dy):
  del num_tokens
  rows, gate, token = saved
  d_weighted = permute.take_or_zero(dy, token)
  d_gate = jnp.einsum(
    '...M,...M->...',
    rows,
    d_weighted,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  d_rows = gate[..., None].astype(dy.dtype) * d_weighted
  return d_rows, d_gate.astype(gate.dtype), None


sum_rows.defvjp(_sum_rows_fwd, _sum_rows_bwd)


def _sum(rows, token, num_tokens):
  total = jnp.zeros((num_tokens, rows.shape[-1]), jnp.float32)
  total = total.at[token].add(rows.astype(jnp.float32), mode='drop')
  return total.astype(rows.dtype)
