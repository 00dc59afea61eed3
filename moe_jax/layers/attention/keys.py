"""The rules for which keys a query attends to, and masks from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Bool, Float, Float32, Int


class Keys(NamedTuple):
  """The rules for which keys of its own segment a query sees.

  Attributes:
    causal: Whether a query sees no key after its own.
    window: The number of keys that a query sees, the last of which is its own;
      0: all up to its own. Only causal attention has a window.
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
  key_positions: Int[Array, ' S'] | None = None,
) -> Bool[Array, 'b T S']:
  """Whether query t sees key s; b is B, or 1 where there are no segments.

  Call this function where the mask is used, so that the mask is fused and never
  stored.

  Args:
    segment_ids: The segment of each query, which sees keys of the same segment.
      Where these or those of the keys are None, each row is one segment.
    key_segment_ids: The segment of each key.
    lengths: The numbers T of queries and S of keys.
    keys: The rules for which keys of its segment a query sees.
    start: The position of the first query.
    key_positions: The position of each key; None: key s is at position s.
  """
  T, S = lengths
  query_position = start + jnp.arange(T, dtype=jnp.int32)[None, :, None]
  if key_positions is None:
    key_positions = jnp.arange(S, dtype=jnp.int32)
  key_position = key_positions[None, None, :]
  mask = jnp.ones((1, T, S), bool)
  if keys.causal:
    mask = mask & (query_position >= key_position)
  if keys.window:
    mask = mask & (query_position - key_position < keys.window)
  if segment_ids is not None and key_segment_ids is not None:
    mask = mask & (segment_ids[:, :, None] == key_segment_ids[:, None, :])
  return mask


def masked_softmax(
  scores: Float32[Array, '*B T S'],
  mask: Bool[Array, '*b T S'],
  sinks: Float32[Array, '*c 1 1'] | None = None,
) -> Float32[Array, '*B T S']:
  """Softmax over the keys where `mask` is True.

  A query without such keys has equal weights or, with a sink, zeros. A sink is
  one more score in the softmax; its weight is dropped, so that the weights of a
  query sum to less than 1. None: no sinks. Mask and sinks may have 1 in place
  of a leading dimension of the scores.
  """
  scores = scores + hidden(mask)
  if sinks is None:
    return jax.nn.softmax(scores)
  sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
  return jax.nn.softmax(jnp.concatenate([scores, sinks], -1))[..., :-1]


def hidden(mask: Bool[Array, '*b T S']) -> Float32[Array, '*b T S']:
  """The numbers that, added to scores, hide keys where `mask` is False.

  They are 0 where the mask is True, and the least float where it is False. To
  select scores by `where` would keep the mask, as large as the scores, for the
  backward pass, although the gradient of hidden scores is zero anyway.
  """
  return jnp.where(mask, 0, jnp.finfo(jnp.float32).min).astype(jnp.float32)
