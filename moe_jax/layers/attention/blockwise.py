"""Attention over blocks of queries, which keeps no scores, for CPUs.

Each block of queries meets only the keys that it may see, so that a causal
layer computes about half of the scores. The output and two numbers for each
query are kept for the backward pass, which computes the scores again, as in
FlashAttention (https://arxiv.org/abs/2205.14135). Unlike in FlashAttention, a
block of queries meets all its keys at once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.layers.attention.keys import Keys, hidden, visible
from moe_jax.shapes import Array, Float, Float32

# The least number of queries in a block, and the largest number of blocks.
# Small blocks compute fewer scores that causality hides, but their products are
# slower.
_LEAST_QUERIES, _MOST_BLOCKS = 64, 8
# Keys that a window hides are left out in multiples of this number.
_KEY_STEP = 16


class Block(NamedTuple):
  """A block of queries, and the keys that some of these queries may see.

  Attributes:
    first: The index of the first query.
    stop: The index after that of the last query.
    first_key: The index of the first key.
    stop_key: The index after that of the last key.
  """

  first: int
  stop: int
  first_key: int
  stop_key: int

  def queries(self, x: Array, axis: int = 1) -> Array:
    """The elements of x, along `axis`, that belong to the block's queries."""
    return jax.lax.slice_in_dim(x, self.first, self.stop, axis=axis)

  def keys(self, x: Array, axis: int = 1) -> Array:
    """The elements of x, along `axis`, that belong to the block's keys."""
    return jax.lax.slice_in_dim(x, self.first_key, self.stop_key, axis=axis)


def blocks_of(num_queries: int, num_keys: int, keys: Keys) -> list[Block]:
  """Cuts T queries into blocks, in order, each with the keys that it may see.

  Args:
    num_queries: T; query t is at position t.
    num_keys: S; key s is at position s.
    keys: The rules for which keys a query sees.
  """
  T, S, query_blocks = num_queries, num_keys, []
  size = -(-T // _MOST_BLOCKS)
  size = -(-size // _LEAST_QUERIES) * _LEAST_QUERIES
  for first in range(0, T, size):
    stop, first_key, stop_key = min(first + size, T), 0, S
    if keys.causal:
      stop_key = min(stop, S)
    if keys.window:
      first_key = max(first - keys.window + 1, 0) // _KEY_STEP * _KEY_STEP
    first_key = min(first_key, stop_key - 1)
    query_blocks.append(Block(first, stop, first_key, stop_key))
  return query_blocks


def blocks(query, key, value, ids, key_ids, *, keys, bias, sinks):
  """Scaled dot-product attention, computed a block of queries at a time.

  Queries are [B, T, H, D], unscaled, keys [B, S, N, D] and values [B, S, N, U]
  of N heads; the result is the weighted means of values of width U,
  [B, T, H, U]. A query sees keys of its own segment, by `ids` [B, T] and
  `key_ids` [B, S]; if either is None, each row is one segment. `keys` has the
  rules for which of these keys it sees. The bias [H, T, S] is added to scaled
  scores, and the sinks [H] are a logit of each head beside them in the softmax,
  which weighs no value; None: there are none.
  """
  # A query that sees no key gets the mean of all values, as in `einsum`, so its
  # block needs all keys. If `key_ids` is `ids`, every query sees its own key.
  block_rules = keys
  if key_ids is not ids:
    block_rules = keys._replace(causal=False, window=0)
  query_blocks = tuple(blocks_of(query.shape[1], key.shape[1], block_rules))
  ids = ids, key_ids
  return _attend(query, key, value, bias, sinks, ids, keys, query_blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(query, key, value, bias, sinks, ids, keys, query_blocks):
  return _forward(query, key, value, bias, sinks, ids, keys, query_blocks)[0]


def _forward(query, key, value, bias, sinks, ids, keys, query_blocks):
  """The output [B, T, H, U], and the arrays that the backward pass reads.

  Queries are [B, T, H, D], keys [B, S, N, D] and values [B, S, N, U]. `ids` are
  the segments of queries and of keys, and `keys` the rules for which keys a
  query sees. `query_blocks` are the blocks of `blocks_of`, which together have
  all queries. For each of the R queries of a block that share one of N heads of
  keys, the backward pass reads two numbers [B, N, R, 1], from which it computes
  the softmax again: the largest score, and the sum of the exponentials of all
  scores less the largest.
  """
  outputs, statistics = [], []
  for block in query_blocks:
    k, v = _by_head(block.keys(key)), _by_head(block.keys(value))
    scores = _scores(block, query, k, bias, ids, keys)
    largest = scores.max(-1, keepdims=True)
    if sinks is not None:
      sink = _sink_of_rows(block, sinks, key.shape[2])
      largest = jnp.maximum(largest, sink)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
      total += jnp.exp(sink - largest)
    y = _product(weights.astype(v.dtype), v, (3, 2)) / total  # [B, N, R, D]
    outputs.append(by_token(y, query.shape[2]).astype(query.dtype))
    statistics.append((largest, total))
  y = jnp.concatenate(outputs, axis=1)
  return y, (query, key, value, bias, sinks, ids, y, statistics)


def _backward(keys, query_blocks, saved, dy):
  # Where layers do not run as a loop, the compiler would see that the forward
  # pass computes the same scores, and store them; the barrier prevents this.
  saved = jax.lax.optimization_barrier(saved)
  query, key, value, bias, sinks, ids, y, statistics = saved
  H, S = query.shape[2], key.shape[1]
  d_query, d_bias = [], []
  d_key = d_value = jnp.float32(0)
  d_sinks = None
  for block, (largest, total) in zip(query_blocks, statistics, strict=True):
    k, v = _by_head(block.keys(key)), _by_head(block.keys(value))
    scores = _scores(block, query, k, bias, ids, keys)
    weights = jnp.exp(scores - largest) / total
    q, d_y, block_output = (
      queries_by_head(block.queries(x), key.shape[2]) for x in (query, dy, y)
    )
    mean = d_y.astype(jnp.float32) * block_output.astype(jnp.float32)
    mean = mean.sum(-1, keepdims=True)
    d_scores = weights * (_product(d_y, v, (3, 3)) - mean)
    if sinks is not None:
      sink = _sink_of_rows(block, sinks, key.shape[2])
      sink_weight = jnp.exp(sink - largest) / total
      head_sums = (sink_weight * mean).sum(0).reshape(len(sinks), -1).sum(1)
      d_sinks = -head_sums if d_sinks is None else d_sinks - head_sums
    if bias is not None:
      d_bias.append(_rows_of_bias(block, d_scores, S))
    weights, d_scores = weights.astype(v.dtype), d_scores.astype(k.dtype)
    d_query.append(by_token(_product(d_scores, k, (3, 2)), H))
    # The gradients of keys and values are computed as [B, N, D, S], so that the
    # compiler transposes the queries for the product, and not the weights,
    # which are more numbers.
    padding = (0, 0), (0, 0), (0, 0), (block.first_key, S - block.stop_key)
    d_key += jnp.pad(_product(keys.scaled(q), d_scores, (2, 2)), padding)
    d_value += jnp.pad(_product(d_y, weights, (2, 2)), padding)
  d_query = keys.scaled(jnp.concatenate(d_query, axis=1))
  if bias is not None:
    d_bias = jnp.concatenate(d_bias, axis=2).reshape(bias.shape)
  return (
    d_query.astype(query.dtype),
    d_key.transpose(0, 3, 1, 2).astype(key.dtype),
    d_value.transpose(0, 3, 1, 2).astype(value.dtype),
    None if bias is None else d_bias,
    d_sinks,
    None,
  )


_attend.defvjp(_forward, _backward)


def _product(x, y, contract) -> Float32[Array, 'B N _ _']:
  """The product of x and y, [B, N, _, _] each, for each index of [B, N].

  It is summed over axis `contract[0]` of x and axis `contract[1]` of y.
  """
  axes = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
  return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _by_head(x: Float[Array, 'B S N D']) -> Float[Array, 'B N S D']:
  return x.swapaxes(1, 2)


def queries_by_head(
  x: Float[Array, 'B t H D'], num_heads: int
) -> Float[Array, 'B N R D']:
  """Gathers the queries that share one of N heads of keys in one dimension R.

  N is `num_heads`. In R = H / N * t, the t tokens of one head of queries are
  side by side.
  """
  (B, t, H, D), N = x.shape, num_heads
  x = x.reshape(B, t, N, H // N, D).transpose(0, 2, 3, 1, 4)
  return x.reshape(B, N, H // N * t, D)


def by_token(x: Float[Array, 'B N R D'], heads: int) -> Float[Array, 'B t H D']:
  """Undoes `queries_by_head`: t = R N / H tokens of H = `heads` heads each."""
  B, N, R, D = x.shape
  J = heads // N
  x = x.reshape(B, N, J, R // J, D).transpose(0, 3, 1, 2, 4)
  return x.reshape(B, R // J, heads, D)


def _sink_of_rows(block, sinks, num_heads) -> Float32[Array, 'b N R 1']:
  """The sink logit of its head for each of a block's queries; b is 1.

  R, the queries that share one of N = `num_heads` heads of keys, is ordered as
  `queries_by_head` orders it. `sinks` is [H].
  """
  head_sinks = sinks.reshape(num_heads, -1)
  rows = jnp.repeat(head_sinks, block.stop - block.first, axis=1)
  return rows[None, :, :, None]


def _scores(block, query, k, bias, ids, keys) -> Float32[Array, 'B N R s']:
  """The scaled scores of a block's queries, with bias and mask added.

  Args:
    block: The block; R are its queries that share one of N heads of keys.
    query: All queries, [B, T, H, D].
    k: The block's s keys, [B, N, s, D].
    bias: The bias [H, T, S] of all queries on all keys, or None.
    ids: The segments [B, T] of all queries and [B, S] of all keys; or None.
    keys: The rules for which keys a query sees, and the scale.
  """
  B, N, s = k.shape[:3]
  q = keys.scaled(queries_by_head(block.queries(query), N))
  scores = _product(q, k, (3, 3))
  t = block.stop - block.first
  scores = scores.reshape(B, N, -1, t, s)  # [B, N, J, t, s]
  if bias is not None:
    bias_block = block.keys(block.queries(bias), 2)  # [H, t, s]
    scores += bias_block.reshape(1, N, -1, t, s)
  if (mask := _mask(block, ids, keys)) is not None:
    scores += mask[:, None, None]
  return scores.reshape(B, N, -1, s)


def _mask(block, ids, keys) -> Float32[Array, 'b t s'] | None:
  """The mask added to scores: 0 where a query sees a key, else the least float.

  It is that of a block's t queries and s keys; b is B, or 1 without segments.
  None where all queries see all keys. `ids` are the segments [B, T] of all
  queries and [B, S] of all keys, or None.
  """
  segment_ids, key_segment_ids = ids
  if segment_ids is not None and key_segment_ids is not None:
    segment_ids = block.queries(segment_ids)
    key_segment_ids = block.keys(key_segment_ids)
  elif not keys.causal:
    return None
  lengths = (block.stop - block.first, block.stop_key - block.first_key)
  start = block.first - block.first_key
  return hidden(visible(segment_ids, key_segment_ids, lengths, keys, start))


def _rows_of_bias(block, d_scores, num_keys) -> Float32[Array, 'N J t S']:
  """The gradient of the bias of a block's t queries, summed over sequences.

  It is made of `d_scores` [B, N, J * t, s], the gradient of the block's scores,
  and is 0 at keys that the block lacks, of S = `num_keys` in all. J = H / N
  query heads share each of N heads of keys. The sum is a product with
  ones, which XLA's CPU compiler computes faster than a sum over the first axis.
  """
  B, N, _, s = d_scores.shape
  ones = jnp.ones((1, B), d_scores.dtype)
  total = ones @ d_scores.reshape(B, -1)
  total = total.reshape(N, -1, block.stop - block.first, s)
  padding = (block.first_key, num_keys - block.stop_key)
  return jnp.pad(total, ((0, 0), (0, 0), (0, 0), padding))
