"""Even choices that no logit made, for measurements of speed."""

import jax.numpy as jnp

from moe_jax.routing.size_checks import check_selected
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Bool, Int, Int32


@checked
def choice_in_turn(
  mask: Bool[Array, 'G S'],
  *,
  num_experts: int,
  num_selected: int,
  first: int | Int[Array, ''] = 0,
) -> Int32[Array, 'G S K']:
  """Gives the choices of a group's real tokens to the experts in turn.

  In each group the loads of two experts differ by one at most, and those of a
  batch without padding do so, too: each group goes on where a full group before
  it would have ended. Choices of padding mean nothing.

  Args:
    mask: False for padding.
    num_experts: The number E of experts.
    num_selected: K, in [1, E]; the choices of a token are different experts.
    first: The expert of the first choice of all.

  Raises:
    ValueError: K is not in [1, E].
  """
  E, K = num_experts, num_selected
  check_selected(K, E)
  G, S = mask.shape
  # The turns are counted modulo E, as G * S * K can be more than an int32.
  begins = (jnp.arange(G, dtype=jnp.int32) % E * (S * K % E) + first) % E
  number = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask  # [G, S]
  turn = begins[:, None, None] + (number % E * K)[..., None]
  return (turn + jnp.arange(K, dtype=jnp.int32)[None, None]) % E
