"""The token in each row of the experts, for both kinds of routing.

A dispatcher puts tokens for the experts into rows: `[E, R]`, R for each expert,
or `[N]`, sorted by expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.shapes import Array, Bool, Float, Int32, Leaf

# The name under which a remat policy finds the routers' decisions.
DECISION = 'routing'


class Rows(NamedTuple):
  """The token and the choice in each row, and the row of each choice.

  A choice is one of a token's K where tokens choose experts, and a slot of an
  expert where experts choose tokens.

  Attributes:
    token: int32 [*R], the token in each row, counted over the G * S tokens of
      all groups; G * S in an empty row.
    choice: int32 [*R], the choice in each row, counted over the choices of
      `gate`; the number of choices in an empty row. None: row i has choice i.
    row: int32, of the shape of `gate`, the row of each choice, counted over all
      rows; the number of rows for a choice that has none. None: choice i has
      row i.
    gate: float32, the weight of each choice: [N, K] where tokens choose, [P]
      for the P slots where experts choose.
    num_tokens: N = G * S, the number of tokens.
  """

  token: Array
  choice: Array | None
  row: Array | None
  gate: Array
  num_tokens: int

  @property
  def by_token(self) -> bool:
    """Whether tokens choose, so that each has K choices with a row or none."""
    return self.gate.ndim == 2


def decided(index: Leaf) -> Leaf:
  """Names a router's decision, an array of integers, for a remat policy.

  It is worth saving: it is small, and to compute it again takes a top-K or a
  sort.
  """
  return checkpoint_name(index, DECISION)


def without_nan(
  mask: Bool[Array, '*G'], x: Float[Array, '*G M']
) -> Float[Array, '*G M']:
  """x, with zeros for NaN and infinities where the mask is False.

  It stands before products, not behind them: a NaN or an infinity of a token
  that is padding would reach the gradients of kernels as 0 * NaN. Finite
  numbers stay, so that outputs at padding are the same as without a mask.
  """
  return _without_nan(mask, x)


@jax.custom_jvp
def _without_nan(mask, x):
  return jnp.where(mask[..., None] | jnp.isfinite(x), x, 0)


@_without_nan.defjvp
def _without_nan_jvp(primals, tangents):
  # The gradient at padding is zero anyway, and a selection would keep a mask as
  # large as x for the backward pass.
  return _without_nan(*primals), tangents[1]


def stable_argsort(
  key: Int32[Array, ' N'], num_keys: int
) -> Int32[Array, ' N']:
  """The order that sorts keys in [0, num_keys); equal keys keep their order."""
  N = key.shape[0]
  number = jnp.arange(N, dtype=jnp.int32)
  if num_keys * N <= np.iinfo(np.int32).max:
    # One array sorts several times as fast as a pair.
    return jnp.sort(key * N + number) % N
  return jax.lax.sort((key, number), num_keys=1, is_stable=True)[1]
