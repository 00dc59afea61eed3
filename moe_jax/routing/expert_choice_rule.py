"""Expert choice: each expert picks the tokens it wants most.

https://arxiv.org/abs/2202.09368. All experts pick equally many tokens, and a
token may be picked by any number of experts, or by none. A pick depends on all
tokens of the group, so that the rule is not causal.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing.assignments import Routing
from moe_jax.routing.capacity import check_slots
from moe_jax.routing.rows import decided
from moe_jax.shapes import Array, Bool, Float, Float32, Int32, checked


@checked
def expert_choice(
  router_logits: Float[Array, 'G S E'],
  *,
  capacity: int,
  mask: Bool[Array, 'G S'] | None = None,
  taken_by: Bool[Array, 'G S E'] | None = None,
) -> Routing:
  """Gives each expert the C tokens of its group with the largest probability.

  Probabilities are the softmax over experts; a picked token's probability is
  its gate. Ties go to the earlier token. In a group with padding experts take
  fewer tokens: ceil(C * n / S) of n real tokens, about as many as if the real
  tokens were a group of their own.

  Args:
    router_logits: The logits, which are taken as float32.
    capacity: C, at most S; c * S / E where tokens have c experts on average.
    mask: False for padding, which no expert picks. Default: all real.
    taken_by: Whether each expert may take each token. An expert that has room
      for all tokens that it may take takes them, whatever their probabilities
      are. Default: every expert may take every token.

  Raises:
    ValueError: The capacity is not in [1, S].

  Source: Section 3.2 of arXiv:2202.09368.
  """
  if mask is None:
    mask = jnp.ones(router_logits.shape[:2], bool)
  may_take = mask[..., None]
  if taken_by is not None:
    may_take = may_take & taken_by
  S = router_logits.shape[1]
  check_slots(capacity, S)
  share = shares(mask.sum(-1, dtype=jnp.int32), S, capacity)
  logits = router_logits.astype(jnp.float32)
  return likeliest_tokens(logits, may_take, share, capacity)


def likeliest_tokens(
  logits: Float32[Array, 'G S E'],
  may_take: Bool[Array, 'G S #E'],
  most: Int32[Array, ' G'],
  capacity: int,
) -> Routing:
  """Gives each expert the tokens of largest probability that it may take.

  Probabilities are the softmax of a token's logits; a taken token's probability
  is its gate. Ties go to the earlier token.

  Args:
    logits: The logits.
    may_take: Whether each expert may take each token.
    most: How many tokens an expert takes in each group; it takes all that it
      may take if they are fewer.
    capacity: C, the slots of an expert; those not filled stay empty.
  """
  S = logits.shape[1]
  probs = jax.nn.softmax(logits).swapaxes(1, 2)  # [G, E, S]
  may_take = may_take.swapaxes(1, 2)
  scores = jnp.where(may_take, jax.lax.stop_gradient(probs), -1.0)
  index = decided(jax.lax.top_k(scores, capacity)[1])  # [G, E, C]
  allowed = may_take.sum(-1, keepdims=True, dtype=jnp.int32)
  slot = jnp.arange(capacity, dtype=jnp.int32)[None, None]
  filled = slot < jnp.minimum(most[:, None, None], allowed)
  gate = jnp.take_along_axis(probs, index, axis=2, mode='clip')
  gate = jnp.where(filled, gate, 0.0)
  return Routing.of_slots(jnp.where(filled, index, S), gate, S)


def shares(
  real: Int32[Array, ' G'], group_size: int, capacity: int
) -> Int32[Array, ' G']:
  """ceil(C n / S), how many of a group's n = `real` tokens an expert takes."""
  # The shares come from a table, as C * n can be more than an int32 holds.
  n = np.arange(group_size + 1, dtype=np.int64)
  table = -(-capacity * n // group_size)
  return jnp.asarray(table, jnp.int32)[real]
