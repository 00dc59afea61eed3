"""Who sees whom: which keys a query attends to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Bool, Float, Float32, Int


class Keys(NamedTuple):
  """Which keys a query sees, beside the segments.

  Attributes:
    causal: Whether a query sees no key after its own.
    window: How many keys a query sees up to its own, the last ones; 0: all of
      them. Causal attention alone has a window.
    scale: Factor of the scores before the bias is added; 0.0 is D^-0.5.
    cross: Whether the keys are another sequence's, of any length.
  """

  causal: bool = True
  window: int = 0
  scale: float = 0.0
  cross: bool = False

  def scaled(self, query: Float[Array, '*B D']) -> Float[Array, '*B D']:
    """The query times the scale."""
    return query * (self.scale or query.shape[-1] ** -0.5)


def visible(
  segment_ids: Int[Array, 'B T'] | None,
  key_segment_ids: Int[Array, 'B S'] | None,
  lengths: tuple[int, int],
  keys: Keys,
  start: int | Int[Array, ''] = 0,
) -> Bool[Array, 'b T S']:
  """Whether the token at place start + t sees the key at place s.

  To be made where it is read, which it fuses into: never kept.
  """
  T, S = lengths
  place = start + jnp.arange(T, dtype=jnp.int32)[None, :, None]
  key_place = jnp.arange(S, dtype=jnp.int32)[None, None, :]
  seen = jnp.ones((1, T, S), bool)
  if keys.causal:
    seen = seen & (place >= key_place)
  if keys.window:
    seen = seen & (place - key_place < keys.window)
  if segment_ids is not None:
    seen = seen & (segment_ids[:, :, None] == key_segment_ids[:, None, :])
  return seen


def masked_softmax(
  scores: Float32[Array, '*B T S'], mask: Bool[Array, '*b T S']
) -> Float32[Array, '*B T S']:
  """Softmax over the keys that `mask` shows; every row shows one."""
  # Added, not selected: a selection keeps the mask, as large as the scores,
  # for a gradient that is zero there anyway.
  hidden = jnp.where(mask, 0, jnp.finfo(scores.dtype).min)
  return jax.nn.softmax(scores + hidden.astype(scores.dtype))
