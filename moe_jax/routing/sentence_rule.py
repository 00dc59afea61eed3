"""Sentences in groups of tokens, and the mean of each sentence's tokens.

A sentence is a segment of a row: an example, or a document of a language model.
Routing by sentence (https://arxiv.org/abs/2110.03742) chooses experts by the
means.
"""

import jax
import jax.numpy as jnp

from moe_jax.shapes import Array, Bool, Float32, Int, Int32, UInt32, checked


def sentence_ids(
  segment_ids: Int[Array, 'G S'], row_length: int
) -> UInt32[Array, 'G S']:
  """An id of each token's sentence, which the next sentence does not have.

  Args:
    segment_ids: The segment of each token in its row.
    row_length: The number of tokens of a row; a group is a part of a row, or
      several rows. 0: a group is a row.
  """
  S = segment_ids.shape[1]
  T = row_length or S
  row = jnp.arange(S, dtype=jnp.uint32) // T
  return segment_ids.astype(jnp.uint32) + jnp.uint32(T + 1) * row[None]


@checked
def sentence_means(
  x: Float32[Array, 'G S M'],
  ids: UInt32[Array, 'G S'],
  mask: Bool[Array, 'G S'],
) -> tuple[Float32[Array, 'G S M'], Int32[Array, 'G S']]:
  """The mean of the real tokens of each sentence in a group.

  Args:
    x: Token representations.
    ids: The id of each token's sentence, as in `sentence_ids`. Real tokens that
      follow each other and have the same id are a sentence; padding between
      them, whatever its id is, does not end it.
    mask: False for padding.

  Returns:
    The means, of which each sentence of a group has one row, in order; the rows
    that are left, up to S, are zero. And for each token the index of the row of
    its sentence.
  """
  S = x.shape[1]
  real_index = jnp.where(mask, jnp.arange(S)[None], 0)
  last = jax.lax.cummax(real_index, axis=1)  # the real token at or before each
  ids = jnp.take_along_axis(ids, last, axis=1)
  begins = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
  sentence = jnp.cumsum(begins.astype(jnp.int32), axis=1)  # [G, S], from 0

  def group_means(x, sentence, mask):
    real = mask.astype(jnp.float32)[:, None]
    total = jax.ops.segment_sum(x * real, sentence, S)
    count = jax.ops.segment_sum(real, sentence, S)
    return total / jnp.maximum(count, 1.0)

  return jax.vmap(group_means)(x, sentence, mask), sentence


@checked
def spread(
  rows: Float32[Array, 'G S M'], sentence: Int32[Array, 'G S']
) -> Float32[Array, 'G S M']:
  """Gives each token its sentence's vector, such as the mean of its tokens.

  `rows` begins, in each group, with the vectors of the group's sentences, in
  order; `sentence` is the index of each token's sentence there.
  """
  return jnp.take_along_axis(rows, sentence[..., None], axis=1)
