"""T5's relative positions: a learned bias on scores by distance."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.layers import parameters
from moe_jax.shapes import Array, Float, Float32, Int, Int32


class RelativePositionBias(nn.Module):
  """A learned bias for each head and bucket of distances, one for all layers.

  Source: section 2.1 of arXiv:1910.10683 (T5).

  Attributes:
    num_heads: The number H of heads.
    num_buckets: The number of ranges of distances; in a bidirectional stack
      half of them are for later keys.
    max_distance: The distance from which on all share the last bucket.
    bidirectional: Whether later keys have buckets by distance; if not, they
      have the bucket of distance 0, and causal attention hides them.
  """

  num_heads: int
  num_buckets: int = 32
  max_distance: int = 128
  bidirectional: bool = False

  @nn.compact
  def __call__(
    self, query_len: int, key_len: int, start: int | Int[Array, ''] = 0
  ) -> Float32[Array, 'H T S']:
    """The bias [t, s] of the query at position start + t on the key at s."""
    init = parameters.boxed(
      nn.initializers.normal(0.02),
      ('heads', 'buckets'),
      role='attention',
      form='table',
    )
    shape = (self.num_heads, self.num_buckets)
    table = self.param('table', init, shape, jnp.float32)
    T, S = query_len, key_len
    # All differences of a key's and a query's position, in ascending order.
    delta = jnp.arange(T + S - 1, dtype=jnp.int32) - (T - 1) - start
    bias = jnp.take(table, self._bucket(delta), axis=1)  # [H, T + S - 1]
    return _toeplitz(bias, T, S)

  def _bucket(self, delta):
    N = self.num_buckets // 2 if self.bidirectional else self.num_buckets
    bucket_table = distance_bucket(
      np.arange(self.max_distance + 1), N, self.max_distance
    )
    distance = jnp.abs(delta) if self.bidirectional else jnp.maximum(-delta, 0)
    bucket = jnp.take(bucket_table, jnp.minimum(distance, self.max_distance))
    if not self.bidirectional:
      return bucket
    return bucket + jnp.where(delta > 0, N, 0)


def _toeplitz(
  values: Float[Array, 'H _'], query_len: int, key_len: int
) -> Float[Array, 'H T S']:
  """values[:, s - t + T - 1] at [:, t, s]: no gather, in value or gradient.

  The values and one number more are repeated in a line, so that each row that
  is cut from the line begins one value later than the one before.
  """
  T, S = query_len, key_len
  H, n = values.shape
  rows = jnp.pad(values, ((0, 0), (0, 1)))
  rows = jnp.tile(rows, (1, T))[:, : T * n].reshape(H, T, n)
  return rows[:, :, T - 1 : T - 1 + S]


def distance_bucket(
  distance: Int[np.ndarray, ' N'], num_buckets: int, max_distance: int
) -> Int32[np.ndarray, ' N']:
  """The bucket of each distance: half of them exact, the others logarithmic.

  Distances from `max_distance` on share the last bucket. It is computed in
  float32, as public checkpoints were trained: an edge can be a distance off.
  """
  exact = num_buckets // 2
  share = np.log(np.maximum(distance, exact).astype(np.float32) / exact)
  share = share / np.float32(np.log(max_distance / exact))
  coarse = exact + (share * (num_buckets - exact)).astype(np.int32)
  bucket = np.where(distance < exact, distance, coarse)
  return np.minimum(bucket, num_buckets - 1).astype(np.int32)
