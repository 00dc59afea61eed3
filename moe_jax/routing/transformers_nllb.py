"""What Hugging Face transformers makes of NLLB-MoE's routing.

Its router decides as published, https://arxiv.org/abs/2207.04672, but its
experts (seen in versions 5.0 to 5.24) take the first choice's one-hot mask for
a list of experts. So every token's first choice is computed by expert 1 and its
second by expert 0, whichever were chosen; gates and drops are right. Only for
outputs that equal that library's.
"""

import dataclasses

import jax.numpy as jnp

from moe_jax.routing.assignments import Routing


def by_rank(routing: Routing) -> Routing:
  """The same gates and drops, with first choices in expert 1, second in 0.

  Every token has a place in both, so nothing more is dropped.

  Raises:
    ValueError: K is not 2.
  """
  G, S, K = routing.expert_index.shape
  if K != 2:
    raise ValueError(f"served_by='transformers_nllb' needs num_selected=2: {K}")
  expert_index = jnp.broadcast_to(jnp.array([1, 0], jnp.int32), (G, S, K))
  slot = jnp.arange(S, dtype=jnp.int32)[None, :, None]
  return dataclasses.replace(
    routing,
    expert_index=expert_index,
    slot=jnp.broadcast_to(slot, (G, S, K)),
    capacity=None if routing.capacity is None else S,
  )
