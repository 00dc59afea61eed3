"""Multi-head and grouped-query attention: to oneself, or to an encoder.

Not here: scores, softmax and their fused forms (`dot_product.py`), positions
(`layers/positions.py`), what is kept between decoding steps (`cache.py`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.layers.attention import dot_product
from moe_jax.layers.attention.cache import KVCache, at_layer
from moe_jax.layers.initializers import Init, zeros
from moe_jax.layers.positions import rotate
from moe_jax.layers.rows_product import rows_matmul
from moe_jax.shapes import Array, Bool, Float, Float32, Int


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Attention.

  Attributes:
    num_heads: H.
    head_width: D, on its own: H * D need not be M.
    num_kv_heads: Heads of keys and values, a divisor of H; each serves H /
      num_kv_heads query heads (arXiv:2305.13245).
    use_bias: Whether the four products add a bias.
    rotary: Whether queries and keys are rotated by position
      (arXiv:2104.09864).
    rope_theta: The base of the rotary wavelengths.
    dropout: Rate on the attention weights, in training; 'einsum' alone has it.
    causal: Whether a token sees those up to itself, or its whole segment.
    window: How many tokens a causal one sees, itself among them; 0 is all
      (Mistral, arXiv:2310.06825; transformers' `sliding_window`).
    scale: What the scores are multiplied by; 0.0 is head_width^-0.5. T5 has
      1.0.
    cross: Whether keys and values are an encoder's.
    implementation: 'einsum' (any option; the scores are an array); 'xla'
      (`jax.nn.dot_product_attention`); 'cudnn' (the same on NVIDIA's kernels,
      in half precision; packed rows cost it a [B, 1, T, T] mask);
      'splash' (a TPU kernel, emulated and slow elsewhere);
      or 'auto': splash on a TPU and cudnn on a GPU where they can serve the
      options, else einsum.
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
  causal: bool = True
  window: int = 0
  scale: float = 0.0
  cross: bool = False
  implementation: str = 'auto'
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
    if self.window < 0 or (self.window and not self.causal):
      raise ValueError(
        f'window={self.window} with causal={self.causal}: it is not negative, '
        'and only causal attention has one'
      )
    if self.cross and (self.causal or self.rotary):
      raise ValueError(
        f'cross-attention with causal={self.causal}, rotary={self.rotary}: '
        'the tokens of two sequences have no common order'
      )
    known = dot_product.IMPLEMENTATIONS
    if self.implementation not in known:
      raise unknown('attention', self.implementation, known)
    dot_product.check(
      self.implementation,
      dtype=self.dtype,
      head_width=self.head_width,
      dropout=self.dropout > 0,
      cross=self.cross,
    )

  @property
  def keys(self) -> dot_product.Keys:
    """Which keys a token sees."""
    return dot_product.Keys(self.causal, self.window, self.scale, self.cross)


class Attention(nn.Module):
  """Scaled dot-product attention within segments."""

  config: AttentionConfig

  def __call__(
    self,
    x: Float[Array, 'B T M'],
    segment_ids: Int[Array, 'B T'] | None,
    positions: Int[Array, 'B T'],
    bias: Float32[Array, 'H T S'] | None = None,
    train: bool = False,
    *,
    memory: Float[Array, 'B S M'] | None = None,
    key_segment_ids: Int[Array, 'B S'] | None = None,
  ) -> Float[Array, 'B T M']:
    """Attends to tokens of the same segment, if causal up to oneself.

    Padding (segment 0) sees padding alone and no other token sees it.

    Args:
      x: Token representations.
      segment_ids: Of each token in its row; None: each row is one segment.
      positions: Of each token in its document, for rotary positions.
      bias: Added to the scaled scores (relative positions).
      train: Turns on dropout.
      memory: The encoder's output, which cross-attention reads.
      key_segment_ids: Of each token that is read, memory's or x's own. None:
        of x, they are `segment_ids`; of a memory, each row is one segment.

    Raises:
      ValueError: The config's implementation cannot serve the length, the
        bias or this machine.
    """

    def attend(query, key, value):
      ids = segment_ids, key_segment_ids
      return self._attend(query, key, value, ids, bias, train)

    return self._project_all(x, memory, positions, attend)

  def decode(
    self,
    x: Float[Array, 'B T M'],
    token_mask: Bool[Array, 'B T'],
    positions: Int[Array, 'B T'],
    bias: Float32[Array, 'H T S'] | None,
    cache: KVCache,
    layer: int | Int[Array, ''],
  ) -> tuple[Float[Array, 'B T M'], KVCache]:
    """Attends to what the cache holds of a layer, and for self-attention to x.

    Args:
      x: Representations of the tokens after those of the cache.
      token_mask: False at padding, which comes in front.
      positions: Of each token.
      bias: Added to the scaled scores of every slot.
      cache: After `KVCache.begin`.
      layer: The layer's number.
    """
    c, kept = self.config, [cache]

    def attend(query, key, value):
      source = cache.memory
      if not c.cross:
        source = kept[0] = cache.write(layer, key, value)
      return dot_product.cached(
        query,
        at_layer(source.key, layer).astype(c.dtype),
        at_layer(source.value, layer).astype(c.dtype),
        # Padded queries may see what they like: they must see something.
        jnp.ones_like(positions) if c.cross else token_mask.astype(jnp.int32),
        source.filled.astype(jnp.int32),
        keys=c.keys,
        start=cache.length,
        bias=bias,
      )

    y = self._project_all(x, None, positions, attend)
    return y, kept[0]

  @nn.compact
  def _project_all(self, x, memory, positions, attend):
    """The products with kernels around attend(query, key, value).

    In cross-attention without a memory, keys and values are None.
    """
    c = self.config
    B, T, M = x.shape
    H, D = c.num_heads, c.head_width
    x = x.astype(c.dtype)
    query, key, value = self._project(x, 'query', H), None, None
    source = memory if c.cross else x
    if source is not None:
      source = source.astype(c.dtype)
      key = self._project(source, 'key', c.num_kv_heads)  # [B, S, N, D]
      value = self._project(source, 'value', c.num_kv_heads)
    if c.rotary:
      query = rotate(query, positions, c.rope_theta)
      key = rotate(key, positions, c.rope_theta)
    y = attend(query, key, value)
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
    # Scores that are not scaled start as those that are (T5).
    shrink = c.scale**2 * c.head_width if name == 'query' and c.scale else 1.0
    init = c.init.kernel(axes, in_axis=0, out_axis=(1, 2), shrink=shrink)
    w = self.param(f'w_{name}', init, shape, c.param_dtype)
    B, T, M = x.shape
    # One contracted dimension in value and gradient; see FeedForward.
    y = rows_matmul(x.reshape(B * T, M), w.reshape(M, -1))
    y = y.reshape(B, T, *shape[1:])
    if c.use_bias:
      b = self.param(f'b_{name}', zeros(axes[1:]), shape[1:], c.param_dtype)
      y = y + b.astype(c.dtype)[None, None]
    return y

  def _attend(self, query, key, value, ids, bias, train):
    c = self.config
    implementation = c.implementation
    if self.is_initializing():
      # Its numbers go nowhere, and its arrays are on no mesh. What is wrong
      # with the config is said here too, before anything compiles.
      dot_product.check(
        implementation,
        dtype=c.dtype,
        head_width=c.head_width,
        seq_len=query.shape[1],
        biased=bias is not None,
        cross=c.cross,
      )
      implementation = 'einsum'
    dropout = None
    if train and c.dropout:
      dropout = nn.Dropout(c.dropout, deterministic=False)
    return dot_product.attend(
      query,
      key,
      value,
      ids[0],
      key_segment_ids=ids[1],
      implementation=implementation,
      keys=c.keys,
      bias=bias,
      dropout=dropout,
    )


def project_memory(
  c: AttentionConfig,
  p: Mapping[str, Any],
  memory: Float[Array, 'B S M'],
) -> tuple[Float[Array, 'R B N S D'], Float[Array, 'R B N S D']]:
  """Keys and values of R cross-attention layers, for a decoder's cache.

  Args:
    c: Of every layer.
    p: Their parameters, each [R, ...].
    memory: The encoder's output.
  """

  def project(name):
    w = p[f'w_{name}'].astype(c.dtype)
    y = jnp.einsum('BSM,RMND->RBNSD', memory.astype(c.dtype), w)
    if c.use_bias:
      y = y + p[f'b_{name}'].astype(c.dtype)[:, None, :, None]
    return y

  return project('key'), project('value')
