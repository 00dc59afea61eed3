"""Moving tokens to the rows of experts and back, for both kinds of routing.

Where tokens choose, each has at most K rows, and both ways are gathers
(`permute.py`). Where experts choose, a token has any number of rows: the way to
the rows is a gather, and the way back a sum into tokens (`token_sums.py`).
"""

from moe_jax.dispatch import permute, token_sums
from moe_jax.errors import InputError
from moe_jax.routing.rows import Rows
from moe_jax.shapes import Array, Float


def take(x: Float[Array, 'G S M'], rows: Rows) -> Float[Array, '*R M']:
  """The token in each row; zero in an empty one."""
  x = x.reshape(rows.num_tokens, x.shape[-1])
  if rows.by_token:
    return permute.take_tokens(x, rows.choice, rows.row)
  return token_sums.take_tokens(x, rows.token)


def give_back(
  values: Float[Array, '*R M'], rows: Rows, group_size: int
) -> Float[Array, 'G S M']:
  """The sum of each token's rows, weighted by its gates.

  Raises:
    ValueError: The values are of another number of rows.
  """
  if values.shape[:-1] != rows.token.shape:
    raise InputError(
      f'rows has shape {values.shape}; the routing has {rows.token.shape} of '
      'them'
    )
  if rows.by_token:
    y: Array = permute.take_rows(values, rows.gate, rows.choice, rows.row)
  else:
    gate = rows.gate.reshape(rows.token.shape)
    if rows.choice is not None and rows.row is not None:
      # A permutation: its gradient is a gather, too.
      gate = permute.take_tokens(
        rows.gate.reshape(-1, 1), rows.choice, rows.row[:, None]
      )[:, 0]
    y = token_sums.sum_rows(values, gate, rows.token, rows.num_tokens)
  return y.reshape(-1, group_size, y.shape[-1])
