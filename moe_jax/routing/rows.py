"""Functions on arrays that both the routing rules and the dispatchers call.

`decided` marks integers that the backward pass need not compute again,
`without_nan` takes NaN out of padding, and `stable_argsort` sorts integers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.shapes import Array, Bool, Float, Int32, Leaf

# The name under which a remat policy finds the routers' decisions.
DECISION = 'routing'


def decided(index: Leaf) -> Leaf:
  """Names a router's decision, an array of integers, so that remat can save it.

  The array is small, and to compute it again in the backward pass would take a
  top-K or a sort.
  """
  return checkpoint_name(index, DECISION)


def without_nan(
  mask: Bool[Array, '*G'], x: Float[Array, '*G M']
) -> Float[Array, '*G M']:
  """x, with zeros for NaN and infinities where the mask is False.

  Call this function before products, not after them: a NaN or an infinity of a
  token that is padding would reach the gradients of kernels as 0 * NaN. Finite
  numbers of padding stay, so that its outputs are the same as without a mask.
  """
  return _without_nan(mask, x)


@jax.custom_jvp
def _without_nan(mask, x):
  return jnp.where(mask[..., None] | jnp.isfinite(x), x, 0)


@_without_nan.defjvp
def _without_nan_jvp(primals, tangents):
  # The gradient passes unchanged: at padding it is zero anyway, and to select
  # would keep a mask as large as x for the backward pass.
  return _without_nan(*primals), tangents[1]


def stable_argsort(
  key: Int32[Array, ' N'], num_keys: int
) -> Int32[Array, ' N']:
  """The indices that sort keys in [0, num_keys), equal ones in their order."""
  N = key.shape[0]
  number = jnp.arange(N, dtype=jnp.int32)
  if num_keys * N <= np.iinfo(np.int32).max:
    # One array is sorted several times as fast as a pair of arrays.
    return jnp.sort(key * N + number) % N
  return jax.lax.sort((key, number), num_keys=1, is_stable=True)[1]
