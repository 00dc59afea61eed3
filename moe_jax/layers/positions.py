"""Where a token stands: rotary positions and T5's relative-position bias.

Not here: learned positions, a table beside the embedding (`models/decoder.py`).
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.shapes import Array, Float, Float32, Int, Int32


def rotate(
  x: Float[Array, 'B T H D'], positions: Int[Array, 'B T'], theta: float
) -> Float[Array, 'B T H D']:
  """Rotates pair (d, d + D/2) by position / theta^(2 d / D), in float32.

  Source: Eq. 34 of arXiv:2104.09864, with the halves paired as Llama and
  Mixtral checkpoints pair them.
  """
  D = x.shape[-1]
  frequency = theta ** (-np.arange(0, D, 2, dtype=np.float32) / D)  # [D/2]
  angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
  sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class RelativePositionBias(nn.Module):
  """A learned bias a head and bucket of distance, shared by all layers.

  Source: section 2.1 of arXiv:1910.10683 (T5), for causal attention.
  """

  num_heads: int
  num_buckets: int = 32
  max_distance: int = 128

  @nn.compact
  def __call__(self, seq_len: int) -> Float32[Array, 'H T T']:
    """The bias of query t on key s; of use where s <= t."""
    init = nn.with_logical_partitioning(
      nn.initializers.normal(0.02), ('heads', 'buckets')
    )
    shape = (self.num_heads, self.num_buckets)
    table = self.param('table', init, shape, jnp.float32)
    bucket = distance_bucket(
      np.arange(seq_len), self.num_buckets, self.max_distance
    )
    place = np.arange(seq_len)
    distance = np.maximum(place[:, None] - place[None, :], 0)
    return table[:, bucket[distance]]


def distance_bucket(
  distance: Int[np.ndarray, ' N'], num_buckets: int, max_distance: int
) -> Int32[np.ndarray, ' N']:
  """Buckets of one distance each up to half, then logarithmic ones.

  Distances from `max_distance` on share the last bucket.
  """
  exact = num_buckets // 2
  share = np.log(np.maximum(distance, exact) / exact)
  share = share / np.log(max_distance / exact)
  coarse = exact + (share * (num_buckets - exact)).astype(np.int32)
  bucket = np.where(distance < exact, distance, coarse)
  return np.minimum(bucket, num_buckets - 1).astype(np.int32)
