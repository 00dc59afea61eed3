"""Dispatchers: how tokens `[G, S, M]` move to the rows of experts and back.

All are equal in value and gradient on the same routing. The rows of `gather`
and `einsum` are `[E, R, M]`, R for each expert. Those of `sorted_rows` are
`[N, M]`, sorted by expert, as many of each as `routing.rows_per_expert()` says.
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
from moe_jax.shapes import Array, Float, Int32, checked


class Dispatcher(NamedTuple):
  """The two directions of a dispatcher.

  Attributes:
    dispatch: The function (tokens [G, S, M], routing) -> rows, with each token
      copied to the rows of its experts.
    combine: The function (rows, routing) -> [G, S, M], the sum of each token's
      rows, weighted by its gates.
  """

  dispatch: Callable[..., Array]
  combine: Callable[..., Array]


@checked
def _by_masks(
  x: Float[Array, 'G S M'], routing: AnyRouting
) -> Float[Array, 'E R M']:
  """A one-hot product, R = G * C; empty slots are zero.

  It costs O(S E C M) per group, which grows with the square of the group size.

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
  """The product back; raises ValueError for a routing without a capacity."""
  weight = routing.slot_weights()
  G, _, E, C = weight.shape
  _check_rows(rows.shape, (E, G * C))
  rows = rows.reshape(E, G, C, -1)
  return jnp.einsum('GSEC,EGCM->GSM', weight.astype(rows.dtype), rows)


@checked
def _to_slots(
  x: Float[Array, 'G S M'], routing: Routing
) -> Float[Array, 'E R M']:
  """The rows of `einsum`, by index: O(S K M) per group.

  Raises:
    ValueError: The routing has no capacity.
  """
  return _take(x, slot_rows(routing))


@checked
def _from_slots(
  rows: Float[Array, 'E R M'], routing: Routing
) -> Float[Array, 'G S M']:
  """The rows back; raises ValueError for a routing without a capacity."""
  return _give_back(rows, slot_rows(routing), routing)


@checked
def _to_sorted(
  x: Float[Array, 'G S M'], routing: Routing
) -> Float[Array, 'N M']:
  """Rows sorted by expert; those that no choice has are zero, and last."""
  return _take(x, rows_by_expert(routing))


@checked
def _from_sorted(
  rows: Float[Array, 'N M'], routing: Routing
) -> Float[Array, 'G S M']:
  """The weighted sum of each token's rows."""
  return _give_back(rows, rows_by_expert(routing), routing)


# The readable reference, as GShard prints it (https://arxiv.org/abs/2006.16668,
# section 3.2).
einsum = Dispatcher(_by_masks, _back_by_masks)
# The default.
gather = Dispatcher(_to_slots, _from_slots)
# No more rows than are needed, as in MegaBlocks
# (https://arxiv.org/abs/2211.15841).
sorted_rows = Dispatcher(_to_sorted, _from_sorted)


def _check_rows(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
  """Raises ValueError where rows are not as many as the routing has."""
  if shape[:-1] != expected:
    raise InputError(
      f'rows has shape {shape}; the routing has {expected} of them'
    )


class Rows(NamedTuple):
  """The token and the choice in each row, and the row of each choice.

  N = G * S are the tokens of all groups, and P the choices of a routing.

  Attributes:
    token: int32 [*R], the token in each row, in [0, N); N in an empty row.
    choice: int32 [*R], the choice in each row, in [0, P); P in an empty row.
    row: int32, the row of each choice, counted over all rows; the number of
      rows for a choice that has none. [N, K] where tokens choose, [P] where
      experts do.
    gate: float32, the weight of each choice, of the shape of `row`.
  """

  token: Array
  choice: Array
  row: Array
  gate: Array


@jax.named_scope('index')
def slot_rows(routing: Routing) -> Rows:
  """The rows [E, R] of slots, R = G * C: group after group for each expert.

  Raises:
    ValueError: There is no capacity.
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
  """The rows [N] sorted by expert, an expert's in the order of the choices.

  N is the most there can be, min(P, E * G * C) of P choices; rows past those
  that are kept are empty.
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
  """The rows of which `choice` and `row` tell each other's places."""
  G, S, gate = len(routing.gate), routing.group_size, routing.gate
  if routing.token_index is None:
    shape, token = (G * S, -1), choice // gate.shape[-1]
  else:
    first = S * jnp.arange(G, dtype=jnp.int32)[:, None, None]
    tokens = (first + routing.token_index).reshape(-1)
    shape, token = (-1,), jnp.append(tokens, jnp.int32(G * S))[choice]
  return Rows(token, choice, row.reshape(shape), gate.reshape(shape))


def _take(x: Float[Array, 'G S M'], rows: Rows) -> Float[Array, '*R M']:
  """The token in each row; zero in an empty one."""
  x = x.reshape(-1, x.shape[-1])
  if rows.row.ndim == 2:
    return take_tokens(x, rows.choice, rows.row)
  return _take_any(x, rows.token, len(x))


def _give_back(
  values: Float[Array, '*R M'], rows: Rows, routing: Routing
) -> Float[Array, 'G S M']:
  """The sum of each token's rows, weighted by its gates."""
  _check_rows(values.shape, rows.token.shape)
  shape = len(routing.gate), routing.group_size, values.shape[-1]
  if rows.row.ndim == 2:
    y: Array = _sum_choices(values, rows.gate, rows.choice, rows.row)
  else:
    # A permutation, whose gradient is a gather, too.
    gate = take_tokens(rows.gate[:, None], rows.choice, rows.row[:, None])
    y = _sum_rows(values, gate[..., 0], rows.token, shape[0] * shape[1])
  return y.reshape(shape)


def _take_or_zero(x: Float[Array, 'N *M'], index: Int32[Array, '*R']):
  """x[index], zero where index is N."""
  # A zero row behind the others: cheaper than mode='fill', which selects.
  x = jnp.concatenate([x, jnp.zeros_like(x[:1])])
  return jnp.take(x, index, axis=0, mode='clip')


def _products(
  rows: Float[Array, '*R M'], others: Float[Array, '*R M']
) -> Array:
  """The product of each row with the other one, in float32."""
  return jnp.einsum(
    '...M,...M->...',
    rows,
    others,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


# Where tokens choose, a row holds at most one choice of a token and a choice at
# most one row, so that both directions and both gradients are gathers; none is
# a scatter-add.


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
  return _take_or_zero(x, choice_index // row_index.shape[-1])


def _take_tokens_fwd(x, choice_index, row_index):
  return take_tokens(x, choice_index, row_index), row_index


def _take_tokens_bwd(row_index, d_rows):
  d_rows = d_rows.reshape(-1, d_rows.shape[-1])  # [R, M]
  return _take_or_zero(d_rows, row_index).sum(-2), None, None


take_tokens.defvjp(_take_tokens_fwd, _take_tokens_bwd)


@jax.custom_vjp
def _sum_choices(
  rows: Float[Array, '*R M'],
  gate: Float[Array, 'N K'],
  choice_index: Int32[Array, '*R'],
  row_index: Int32[Array, 'N K'],
) -> Float[Array, 'N M']:
  """Each token's rows, weighted by the gates and summed over its choices.

  The indices are those of `take_tokens`.
  """
  flat = rows.reshape(-1, rows.shape[-1])  # [R, M]
  choice_rows = _take_or_zero(flat, row_index)  # [N, K, M]
  return (gate[..., None].astype(rows.dtype) * choice_rows).sum(-2)


def _sum_choices_fwd(rows, gate, choice_index, row_index):
  y = _sum_choices(rows, gate, choice_index, row_index)
  return y, (rows, gate, choice_index, row_index)


def _sum_choices_bwd(saved, dy):
  rows, gate, choice_index, row_index = saved
  # Both gradients come from the rows of dy: to take the rows of experts again
  # would move as many bytes once more.
  row_dy = _take_or_zero(dy, choice_index // gate.shape[-1])  # [*R, M]
  d_row_gate = _products(rows, row_dy)
  d_gate = _take_or_zero(d_row_gate.reshape(-1), row_index)  # [N, K]
  row_gate = _take_or_zero(gate.reshape(-1), choice_index)[..., None]
  d_rows = row_gate.astype(dy.dtype) * row_dy
  return d_rows, d_gate.astype(gate.dtype), None, None


_sum_choices.defvjp(_sum_choices_fwd, _sum_choices_bwd)


# Where experts choose, a token has any number of rows. The way back is a sum
# into tokens, a scatter-add: its cost grows with the rows, where that of a list
# of each token's rows would grow with the experts. Sums are float32.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_any(x, token, num_tokens):
  """The token in each row; zero where its index is N, `num_tokens`."""
  del num_tokens
  return _take_or_zero(x, token)


def _take_any_bwd(num_tokens, token, d_rows):
  return _sum_into_tokens(d_rows, token, num_tokens), None


_take_any.defvjp(
  lambda x, token, n: (_take_any(x, token, n), token), _take_any_bwd
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sum_rows(
  rows: Float[Array, '*R M'],
  gate: Float[Array, '*R'],
  token: Int32[Array, '*R'],
  num_tokens: int,
) -> Float[Array, 'N M']:
  """Each token's rows, weighted by the gates and summed; N: an empty row."""
  weighted = gate[..., None].astype(rows.dtype) * rows
  return _sum_into_tokens(weighted, token, num_tokens)


def _sum_rows_fwd(rows, gate, token, num_tokens):
  return _sum_rows(rows, gate, token, num_tokens), (rows, gate, token)


def _sum_rows_bwd(num_tokens, saved, dy):
  del num_tokens
  rows, gate, token = saved
  d_weighted = _take_or_zero(dy, token)
  d_rows = gate[..., None].astype(dy.dtype) * d_weighted
  return d_rows, _products(rows, d_weighted).astype(gate.dtype), None


_sum_rows.defvjp(_sum_rows_fwd, _sum_rows_bwd)


def _sum_into_tokens(rows, token, num_tokens):
  total = jnp.zeros((num_tokens, rows.shape[-1]), jnp.float32)
  total = total.at[token].add(rows.astype(jnp.float32), mode='drop')
  return total.astype(rows.dtype)
