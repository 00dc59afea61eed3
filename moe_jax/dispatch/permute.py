"""Moving rows by index, with gradients that are gathers too.

A row holds at most one choice of a token and a choice at most one row, so
both directions and both gradients are gathers; none is a scatter-add.
"""

import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Float, Int32


def take_or_zero(x: Float[Array, 'N *M'], index: Int32[Array, '*R']):
  """x[index], zero where index is N."""
  # A zero row behind the others: cheaper than mode='fill', which selects.
  x = jnp.concatenate([x, jnp.zeros_like(x[:1])])
  return jnp.take(x, index, axis=0, mode='clip')


@jax.custom_vjp
def take_tokens(
  x: Float[Array, 'N M'],
  choice_index: Int32[Array, '*R'],
  row_index: Int32[Array, 'N K'],
) -> Float[Array, '*R M']:
  """The token behind the choice in each row; zero in an empty row.

  Args:
    x: The tokens.
    choice_index: The choice in each row, counted over the N * K choices of all
      tokens; N * K in an empty row.
    row_index: The row of each choice, counted over all R rows; R for a choice
      that has none.
  """
  return take_or_zero(x, choice_index // row_index.shape[-1])


def _take_tokens_fwd(x, choice_index, row_index):
  return take_tokens(x, choice_index, row_index), row_index


def _take_tokens_bwd(row_index, d_rows):
  d_rows = d_rows.reshape(-1, d_rows.shape[-1])  # [R, M]
  return take_or_zero(d_rows, row_index).sum(-2), None, None


take_tokens.defvjp(_take_tokens_fwd, _take_tokens_bwd)


@jax.custom_vjp
def take_rows(
  rows: Float[Array, '*R M'],
  gate: Float[Array, 'N K'],
  choice_index: Int32[Array, '*R'],
  row_index: Int32[Array, 'N K'],
) -> Float[Array, 'N M']:
  """Each token's rows, weighted by the gates and summed over its choices.

  The indices are those of `take_tokens`.
  """
  flat = rows.reshape(-1, rows.shape[-1])  # [R, M]
  choice_rows = take_or_zero(flat, row_index)  # [N, K, M]
  return (gate[..., None].astype(rows.dtype) * choice_rows).sum(-2)


def _take_rows_fwd(rows, gate, choice_index, row_index):
  y = take_rows(rows, gate, choice_index, row_index)
  return y, (rows, gate, choice_index, row_index)


def _take_rows_bwd(saved, dy):
  rows, gate, choice_index, row_index = saved
  # Both gradients come from the rows of dy: to take the rows of experts again
  # would move as many bytes once more.
  row_dy = take_or_zero(dy, choice_index // gate.shape[-1])  # [*R, M]
  d_row_gate = jnp.einsum(
    '...M,...M->...',
    rows,
    row_dy,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  d_gate = take_or_zero(d_row_gate.reshape(-1), row_index)  # [N, K]
  row_gate = take_or_zero(gate.reshape(-1), choice_index)[..., None]
  d_rows = row_gate.astype(dy.dtype) * row_dy
  return d_rows, d_gate.astype(gate.dtype), None, None


take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)
