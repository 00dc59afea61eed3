"""Dispatchers: how tokens `[G, S, M]` move to the rows of experts and back.

All dispatchers are equal in value and gradient on the same routing. The rows of
`gather` and `einsum` are `[E, R, M]`, R for each expert. The rows of
`sorted_rows` are `[N, M]`, sorted by expert; `routing.rows_per_expert()` says
how many each expert has.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.routing.assignments import Routing
from moe_jax.routing.rows import decided, stable_argsort, without_nan
from moe_jax.routing.soft_rule import AnyRouting
from moe_jax.shapes import Array, Float, Int32, Leaf, checked


class Dispatcher(NamedTuple):
  """The two directions of a dispatcher.

  Attributes:
    dispatch: The function (tokens [G, S, M], routing) -> rows, [E, R, M] or,
      sorted by expert, [N, M], with each token copied to those of its experts.
    combine: The function (rows, routing) -> [G, S, M], the sum of each token's
      rows, weighted by its gates.
  """

  dispatch: Callable[..., Array]
  combine: Callable[..., Array]


@checked
def _by_masks(
  x: Float[Array, 'G S M'], routing: AnyRouting
) -> Float[Array, 'E R M']:
  """Fills slots by a product with the share of each token in each slot.

  A slot holds one token or, by a `SoftRouting`, a mixture. The rows of an
  expert are its slots in all groups, R = G * C. Empty slots are zero. The
  product costs O(S E C M) per group, which grows with the square of the group
  size, since C grows with S.

  Raises:
    ValueError: The routing has no capacity.
  """
  send = routing.slot_shares()
  # A product would spread a NaN of a token that no expert serves: 0 * NaN.
  x = without_nan(send.any((2, 3)), x)
  rows = jnp.einsum('GSEC,GSM->EGCM', send.astype(x.dtype), x)
  return rows.reshape(len(rows), -1, rows.shape[-1])


@checked
def _back_by_masks(
  rows: Float[Array, 'E R M'], routing: AnyRouting
) -> Float[Array, 'G S M']:
  """Sums each token's rows, weighted by its gates, by a product.

  Raises:
    ValueError: The routing has no capacity.
  """
  weight = routing.slot_weights()
  G, _, E, C = weight.shape
  _check_rows(rows.shape, (E, G * C))
  rows = rows.reshape(E, G, C, -1)
  return jnp.einsum('GSEC,EGCM->GSM', weight.astype(rows.dtype), rows)


@checked
def _to_slots(
  x: Float[Array, 'G S M'], routing: Routing
) -> Float[Array, 'E R M']:
  """Moves tokens to slots by index, which costs O(S K M) per group.

  The rows of an expert are its slots in all groups, R = G * C. Empty slots are
  zero.

  Raises:
    ValueError: The routing has no capacity.
  """
  return _take(x, slot_rows(routing))


@checked
def _from_slots(
  rows: Float[Array, 'E R M'], routing: Routing
) -> Float[Array, 'G S M']:
  """Sums each token's rows, weighted by its gates, by index.

  Raises:
    ValueError: The routing has no capacity.
  """
  return _give_back(rows, slot_rows(routing), routing)


@checked
def _to_sorted(
  x: Float[Array, 'G S M'], routing: Routing
) -> Float[Array, 'N M']:
  """Moves tokens to rows sorted by expert; empty rows are zero, and last.

  N is the largest number of choices that the routing can keep.
  """
  return _take(x, rows_by_expert(routing))


@checked
def _from_sorted(
  rows: Float[Array, 'N M'], routing: Routing
) -> Float[Array, 'G S M']:
  """The sum of each token's rows, of N sorted by expert, weighted by gates."""
  return _give_back(rows, rows_by_expert(routing), routing)


# The readable reference dispatcher, as GShard prints it
# (https://arxiv.org/abs/2006.16668, section 3.2).
einsum = Dispatcher(_by_masks, _back_by_masks)
# The default dispatcher.
gather = Dispatcher(_to_slots, _from_slots)
# The dispatcher without empty slots, as in MegaBlocks
# (https://arxiv.org/abs/2211.15841).
sorted_rows = Dispatcher(_to_sorted, _from_sorted)


def _check_rows(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
  """Raises ValueError unless `shape` without its last size M is `expected`."""
  if shape[:-1] != expected:
    raise InputError(
      f'rows has shape {shape}; the routing has {expected} of them'
    )


class Rows(NamedTuple):
  """The token and the choice in each row of an expert, and each choice's row.

  N = G * S is the number of tokens of all groups, and P the number of choices
  of a routing. Rows are [E, R] for R slots an expert, or, sorted by expert, one
  dimension; [*R] stands for both.

  Attributes:
    token: int32 [*R], the token in each row, in [0, N); N in an empty row.
    choice: int32 [*R], the choice in each row, in [0, P); P in an empty row.
    row: int32, the row of each choice, counted over all rows; the number of
      rows for a choice that has none. [N, K] where tokens choose, [P] where
      experts do.
    gate: float32, the weight of each choice, of the shape of `row`.
  """

  token: Leaf
  choice: Leaf
  row: Leaf
  gate: Leaf


@jax.named_scope('index')
def slot_rows(routing: Routing) -> Rows:
  """The contents of all slots, as rows [E, R] with R = G * C for each expert.

  The rows of an expert are its slots in each group, group after group.

  Raises:
    ValueError: The routing has no capacity.
  """
  G, E, C = len(routing.gate), routing.num_experts, routing.bounded()
  group = jnp.arange(G, dtype=jnp.int32)[:, None, None]
  row = (routing.expert_index * G + group) * C + routing.slot
  row = jnp.where(routing.kept, row, E * G * C)
  choice = jnp.arange(row.size, dtype=jnp.int32)
  empty = jnp.full(E * G * C, row.size, jnp.int32)
  placed = empty.at[row.reshape(-1)].set(choice, mode='drop')
  return _rows(routing, decided(placed.reshape(E, G * C)), row)


@jax.named_scope('index')
def rows_by_expert(routing: Routing) -> Rows:
  """The contents of rows [N] that are sorted by expert, without empty slots.

  The rows of an expert stand in the order of the choices that they hold.

  N is the largest number of choices that can be kept, min(P, E * G * C) of P
  choices; the rows after those of the kept choices are empty.
  """
  P, E = routing.gate.size, routing.num_experts
  N = P
  if routing.capacity is not None:
    N = min(P, E * len(routing.gate) * routing.capacity)
  choice = stable_argsort(routing.server.reshape(-1), E + 1)[:N]
  number = jnp.arange(N, dtype=jnp.int32)
  choice = decided(jnp.where(number < routing.kept.sum(), choice, P))
  row = jnp.full(P, N, jnp.int32).at[choice].set(number, mode='drop')
  return _rows(routing, choice, decided(row))


def _rows(routing: Routing, choice: Array, row: Array) -> Rows:
  G, S, gate = len(routing.gate), routing.group_size, routing.gate
  if routing.token_index is None:
    shape, token = (G * S, -1), choice // gate.shape[-1]
  else:
    first = S * jnp.arange(G, dtype=jnp.int32)[:, None, None]
    tokens = (first + routing.token_index).reshape(-1)
    shape, token = (-1,), jnp.append(tokens, jnp.int32(G * S))[choice]
  return Rows(token, choice, row.reshape(shape), gate.reshape(shape))


def _take(x: Float[Array, 'G S M'], rows: Rows) -> Float[Array, '*R M']:
  x = x.reshape(-1, x.shape[-1])
  return take_tokens(x, rows.token, rows.row, len(x))


def _give_back(
  values: Float[Array, '*R M'], rows: Rows, routing: Routing
) -> Float[Array, 'G S M']:
  """The sum of the expert rows of each token, weighted by the token's gates."""
  _check_rows(values.shape, rows.token.shape)
  shape = len(routing.gate), routing.group_size, values.shape[-1]
  y: Array = _sum_rows(values, rows, shape[0] * shape[1])
  return y.reshape(shape)


# A row holds at most one choice, and a choice has at most one row, so that the
# functions below read gates and their gradients by a gather. Where tokens
# choose, each token has K choices, so that rows are gathered, too. Where
# experts choose, a token may have any number of rows, so that rows are added to
# tokens by a scatter-add: its cost grows with the number of rows, while a
# gather would need a list of E rows for each token.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take_tokens(
  x: Float[Array, 'N M'],
  token: Int32[Array, '*R'],
  row: Int32[Array, 'N K'] | Int32[Array, ' P'],
  num_tokens: int,
) -> Float[Array, '*R M']:
  """Fills the rows that experts multiply with copies of tokens' vectors.

  Args:
    x: The vectors of the tokens.
    token: The index of the token that each row gets; N for a row of zeros.
    row: The inverse of `token`, for the gradient alone. Where tokens choose, it
      is the row of each of a token's K choices, counted over all rows, or the
      number of rows where a choice has none. Where experts choose, it is any
      array [P]: the gradient is then made by `token`.
    num_tokens: N, the number of tokens.
  """
  del row, num_tokens
  return _take_or_zero(x, token)


def _take_tokens_fwd(x, token, row, num_tokens):
  rows = take_tokens(x, token, row, num_tokens)
  return rows, (None if row.ndim == 2 else token, row)


def _take_tokens_bwd(num_tokens, saved, d_rows):
  token, row = saved
  if row.ndim == 2:
    d_rows = d_rows.reshape(-1, d_rows.shape[-1])  # [R, M]
    return _take_or_zero(d_rows, row).sum(-2), None, None
  return _sum_into_tokens(d_rows, token, num_tokens), None, None


take_tokens.defvjp(_take_tokens_fwd, _take_tokens_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sum_rows(
  values: Float[Array, '*R M'], rows: Rows, num_tokens: int
) -> Float[Array, 'N M']:
  gate = rows.gate[..., None].astype(values.dtype)
  if rows.row.ndim == 2:
    flat = values.reshape(-1, values.shape[-1])  # [R, M]
    return (gate * _take_or_zero(flat, rows.row)).sum(-2)
  weighted = _take_or_zero(gate, rows.choice) * values
  return _sum_into_tokens(weighted, rows.token, num_tokens)


def _sum_rows_fwd(values, rows, num_tokens):
  return _sum_rows(values, rows, num_tokens), (values, rows)


def _sum_rows_bwd(num_tokens, saved, dy):
  del num_tokens
  values, (token, choice, row, gate) = saved
  # The gradients of rows and of gates are computed from one gather, the row of
  # dy for each expert row. To gather the expert row of each choice, for the
  # gates, would move as many bytes again.
  row_dy = _take_or_zero(dy, token)  # [*R, M]
  d_row_gate = jnp.einsum(
    '...M,...M->...',
    values,
    row_dy,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  d_gate = _take_or_zero(d_row_gate.reshape(-1), row).astype(gate.dtype)
  row_gate = _take_or_zero(gate.reshape(-1), choice)[..., None]
  d_rows = row_gate.astype(dy.dtype) * row_dy
  return d_rows, Rows(None, None, None, d_gate)


_sum_rows.defvjp(_sum_rows_fwd, _sum_rows_bwd)


def _take_or_zero(x: Float[Array, 'N *M'], index: Int32[Array, '*R']):
  """x[index], or zeros where the index is N, the length of x."""
  # A row of zeros behind x is cheaper than mode='fill', which selects between
  # values and zeros after the gather.
  x = jnp.concatenate([x, jnp.zeros_like(x[:1])])
  return jnp.take(x, index, axis=0, mode='clip')


def _sum_into_tokens(rows, token, num_tokens):
  """The sum of each token's rows, added up in float32.

  Args:
    rows: The rows, [*R, M].
    token: int32 [*R], the token of each row; `num_tokens` in an empty row.
    num_tokens: The number of sums in the result, [num_tokens, M].
  """
  total = jnp.zeros((num_tokens, rows.shape[-1]), jnp.float32)
  total = total.at[token].add(rows.astype(jnp.float32), mode='drop')
  return total.astype(rows.dtype)
