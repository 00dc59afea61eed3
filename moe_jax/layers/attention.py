"""Multi-head and grouped-query attention, rotary and relative positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.layers.initializers import Init, zeros
from moe_jax.layers.matmul import rows_matmul
from moe_jax.shapes import Array, Bool, Float, Float32, Int, Int32


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Self-attention.

  Attributes:
    num_heads: H.
    head_width: D, on its own: H * D need not be M.
    num_kv_heads: Heads of keys and values, a divisor of H; each serves H /
      num_kv_heads query heads (arXiv:2305.13245).
    use_bias: Whether the four products add a bias.
    rotary: Whether queries and keys are rotated by position
      (arXiv:2104.09864).
    rope_theta: The base of the rotary wavelengths.
    dropout: Rate on the attention weights, in training.
    dtype: Of the products and the output; the softmax is float32.
    param_dtype: Of the stored parameters.
    init: How kernels start.
  """

  num_heads: int
  head_width: int
  num_kv_heads: int
  use_bias: bool = False
  rotary: bool = False
  rope_theta: float = 10_000.0
  dropout: float = 0.0
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  init: Init = Init()

  def __post_init__(self):
    if self.num_heads < 1 or self.head_width < 1:
      raise ValueError(
        f'num_heads={self.num_heads} and head_width={self.head_width} '
        'must be at least 1'
      )
    if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_kv_heads={self.num_kv_heads} does not divide '
        f'num_heads={self.num_heads}'
      )
    if self.rotary and self.head_width % 2:
      raise ValueError(f'rotary needs an even head_width={self.head_width}')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout} not in [0, 1)')


class Attention(nn.Module):
  """Scaled dot-product self-attention under a mask."""

  config: AttentionConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T M'],
    mask: Bool[Array, 'B T S'],
    positions: Int[Array, 'B T'],
    bias: Float32[Array, 'H T S'] | None = None,
    train: bool = False,
  ) -> Float[Array, 'B T M']:
    """Attends where `mask` is True (query t, key s); every row has one.

    Args:
      x: Token representations.
      mask: Who may see whom.
      positions: Of each token in its document, for rotary positions.
      bias: Added to the scaled scores (relative positions).
      train: Turns on dropout.
    """
    c = self.config
    B, T, M = x.shape
    H, D, N = c.num_heads, c.head_width, c.num_kv_heads
    x = x.astype(c.dtype)
    query = self._project(x, 'query', H)  # [B, T, H, D]
    key = self._project(x, 'key', N)
    value = self._project(x, 'value', N)
    if c.rotary:
      query = rotate(query, positions, c.rope_theta)
      key = rotate(key, positions, c.rope_theta)
    query = query.reshape(B, T, N, H // N, D) * D**-0.5
    scores = jnp.einsum(
      'BTNJD,BSND->BNJTS', query, key, preferred_element_type=jnp.float32
    )
    if bias is not None:
      scores = scores + bias.reshape(1, N, H // N, *bias.shape[1:])
    weights = masked_softmax(scores, mask[:, None, None]).astype(c.dtype)
    weights = nn.Dropout(c.dropout, deterministic=not train)(weights)
    y = jnp.einsum('BNJTS,BSND->BTNJD', weights, value).reshape(B, T, H, D)
    axes = ('heads', 'kv', 'embed')
    init = c.init.kernel(axes, in_axis=(0, 1), out_axis=2, residual=True)
    w_out = self.param('w_out', init, (H, D, M), c.param_dtype)
    y = rows_matmul(y.reshape(B * T, H * D), w_out.reshape(H * D, M))
    if c.use_bias:
      b = self.param('b_out', zeros(('embed',)), (M,), c.param_dtype)
      y = y + b.astype(c.dtype)[None]
    return y.reshape(B, T, M)

  def _project(self, x, name, heads):
    c = self.config
    axes = ('embed', 'heads' if name == 'query' else 'kv_heads', 'kv')
    shape = (x.shape[-1], heads, c.head_width)
    init = c.init.kernel(axes, in_axis=0, out_axis=(1, 2))
    w = self.param(f'w_{name}', init, shape, c.param_dtype)
    B, T, M = x.shape
    # One contracted dimension in value and gradient; see FeedForward.
    y = rows_matmul(x.reshape(B * T, M), w.reshape(M, -1))
    y = y.reshape(B, T, *shape[1:])
    if c.use_bias:
      b = self.param(f'b_{name}', zeros(axes[1:]), shape[1:], c.param_dtype)
      y = y + b.astype(c.dtype)[None, None]
    return y


def masked_softmax(
  scores: Float32[Array, '*B T S'], mask: Bool[Array, '*b T S']
) -> Float32[Array, '*B T S']:
  """Softmax over the keys that `mask` shows."""
  return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min))


def causal_mask(segment_ids: Int[Array, 'B T']) -> Bool[Array, 'B T T']:
  """Token t sees the tokens up to t of its own segment."""
  T = segment_ids.shape[1]
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return same & np.tri(T, dtype=bool)[None]


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
