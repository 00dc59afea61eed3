"""Multi-head and grouped-query attention: to oneself, or to an encoder.

Not here: scores, softmax and their fused forms (`dot_product.py`), positions
(`layers/positions.py`), what is kept between decoding steps (`cache.py`).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.attention import dot_product
from moe_jax.layers.attention.cache import KVCache, at_layer
from moe_jax.layers.positions import NoPositions, Positions
from moe_jax.layers.shared import Shared
from moe_jax.options import OptionError, Options, at_least, one_of, option
from moe_jax.shapes import Array, Bool, Float, Float32, Int

_ROLE = 'attention'


@dataclasses.dataclass(frozen=True)
class AttentionOptions(Options):
  """Attention of several heads, as a model has it in every layer."""

  num_heads: int = option(4, 'Number H of query heads.', at_least(1))
  num_kv_heads: int = option(
    0,
    'Number of heads of keys and values, a divisor of num_heads; each serves '
    'as many query heads in a row (arXiv:2305.13245); 0: num_heads.',
    at_least(0),
  )
  head_width: int = option(
    0, 'Width D of a head; 0: width / num_heads.', at_least(0)
  )
  window: int = option(
    0,
    'Number of tokens that a causal token sees, itself among them (Mistral, '
    'arXiv:2310.06825); 0: all before it. An encoder has none.',
    at_least(0),
  )
  scale: str = option(
    'head_width',
    "Factor of the scores: 'head_width' is head_width^-0.5; 'none' is 1, as in "
    'T5, whose query kernels start smaller instead.',
    one_of('head_width', 'none'),
  )
  implementation: str = option(
    'auto',
    "Who computes scores and softmax: 'einsum' (any option; the scores are an "
    "array); 'xla' (jax.nn.dot_product_attention); 'cudnn' (the same on "
    "NVIDIA's kernels, in half precision; packed rows cost it a [B, 1, T, T] "
    "mask); 'splash' (a TPU kernel, emulated and slow elsewhere); or 'auto': "
    'splash on a TPU and cudnn on a GPU where they can serve the options, else '
    'einsum.',
    one_of(*dot_product.IMPLEMENTATIONS),
    how=True,
  )

  def problems(self) -> Iterator[str]:
    """Query heads are shared evenly."""
    if self.num_kv_heads and self.num_heads % self.num_kv_heads:
      yield (
        f'num_kv_heads={self.num_kv_heads} does not divide '
        f'num_heads={self.num_heads}'
      )

  def within(self, width: int) -> 'AttentionOptions':
    """These options in a model of that width: no size of them is 0.

    Raises:
      OptionError: The heads do not divide the width, and have none of their
        own.
    """
    if not self.head_width and width % self.num_heads:
      raise OptionError(
        [
          f'num_heads={self.num_heads} does not divide width={width}; set '
          'head_width'
        ]
      )
    return dataclasses.replace(
      self,
      num_kv_heads=self.num_kv_heads or self.num_heads,
      head_width=self.head_width or width // self.num_heads,
    )

  def shrunk(self) -> 'AttentionOptions':
    """See `Options.shrunk`."""
    grouped = 0 < self.num_kv_heads < self.num_heads
    return dataclasses.replace(
      self,
      num_heads=4,
      num_kv_heads=2 if grouped else 0,
      head_width=16 if self.head_width else 0,
      window=min(self.window, 8),
      implementation='auto',
    )

  def keys(self, *, causal: bool, cross: bool = False) -> dot_product.Keys:
    """The keys that a token sees in a layer that is causal, or reads another.

    A window is that of causal attention.
    """
    return dot_product.Keys(
      causal=causal,
      window=self.window if causal else 0,
      scale=0.0 if self.scale == 'head_width' else 1.0,
      cross=cross,
    )


class Attention(nn.Module):
  """Scaled dot-product attention within segments.

  Attributes:
    options: Heads, window, scale and implementation.
    shared: What the layers of the model share.
    positions: How queries and keys know where they stand.
    causal: Whether a token sees those up to itself, or its whole segment.
    cross: Whether keys and values are an encoder's. The tokens of two sequences
      have no common order: no positions rotate them.
    dropout: The rate at which weights are dropped in training; 'einsum' alone
      has it.
  """

  options: AttentionOptions
  shared: Shared = Shared()
  positions: Positions = NoPositions()
  causal: bool = True
  cross: bool = False
  dropout: float = 0.0

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
      segment_ids: The segment of each token in its row; None: each row is one
        segment.
      positions: The position of each token in its document.
      bias: Relative positions, which are added to the scaled scores.
      train: Turns on dropout.
      memory: The encoder's output, which cross-attention reads.
      key_segment_ids: The segment of each token that is read, memory's or x's
        own. None: those of x are `segment_ids`; each row of a memory is one
        segment.

    Raises:
      ValueError: Heads do not divide the width, or the implementation cannot
        serve the length, the bias or this machine.
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
      positions: The position of each token.
      bias: What is added to the scaled scores of every slot.
      cache: The cache as `KVCache.begin` returned it.
      layer: The layer's number.
    """
    dtype, kept = self.shared.dtype, [cache]

    def attend(query, key, value):
      source = cache.memory
      if not self.cross:
        source = kept[0] = cache.write(layer, key, value)
      return dot_product.cached(
        query,
        at_layer(source.key, layer).astype(dtype),
        at_layer(source.value, layer).astype(dtype),
        # Padded queries may see what they like: they must see something.
        jnp.ones_like(positions)
        if self.cross
        else token_mask.astype(jnp.int32),
        source.filled.astype(jnp.int32),
        keys=self._keys,
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
    B, T, M = x.shape
    c, dtype = self.options.within(M), self.shared.dtype
    H, D = c.num_heads, c.head_width
    x = x.astype(dtype)
    query, key, value = self._query(x, c), None, None
    source = memory if self.cross else x
    if source is not None:
      source = source.astype(dtype)
      key = self._key_or_value(source, 'key', c)  # [B, S, N, D]
      value = self._key_or_value(source, 'value', c)
    if not self.cross:
      query = self.positions.rotate(query, positions)
      key = self.positions.rotate(key, positions)
    y = attend(query, key, value)
    axes = ('heads', 'kv', 'embed')
    init = parameters.kernel(
      self.shared, axes, role=_ROLE, in_axis=(0, 1), out_axis=2, residual=True
    )
    w_out = self.param('w_out', init, (H, D, M), self.shared.param_dtype)
    y = rows_matmul(y.reshape(B * T, H * D), w_out.reshape(H * D, M))
    if self.shared.use_bias:
      init = parameters.bias(('embed',), role=_ROLE)
      b = self.param('b_out', init, (M,), self.shared.param_dtype)
      y = y + b.astype(dtype)[None]
    return y.reshape(B, T, M)

  @property
  def _keys(self) -> dot_product.Keys:
    return self.options.keys(causal=self.causal, cross=self.cross)

  def _query(self, x, c):
    # Scores that are not scaled start as those that are (T5).
    shrink = self._keys.scale**2 * c.head_width or 1.0
    return self._project(
      x, 'query', ('heads', c.num_heads), c.head_width, shrink
    )

  def _key_or_value(self, x, name, c):
    return self._project(x, name, ('kv_heads', c.num_kv_heads), c.head_width)

  def _project(self, x, name, heads, head_width, shrink=1.0):
    axes = ('embed', heads[0], 'kv')
    shape = (x.shape[-1], heads[1], head_width)
    init = parameters.kernel(
      self.shared,
      axes,
      role=_ROLE,
      in_axis=0,
      out_axis=(1, 2),
      shrink=shrink,
    )
    w = self.param(f'w_{name}', init, shape, self.shared.param_dtype)
    B, T, M = x.shape
    y = rows_matmul(x.reshape(B * T, M), w.reshape(M, -1))
    y = y.reshape(B, T, *shape[1:])
    if self.shared.use_bias:
      init = parameters.bias(axes[1:], role=_ROLE)
      b = self.param(f'b_{name}', init, shape[1:], self.shared.param_dtype)
      y = y + b.astype(self.shared.dtype)[None, None]
    return y

  def _attend(self, query, key, value, ids, bias, train):
    implementation = self.options.implementation
    if self.is_initializing():
      # Its numbers go nowhere, and its arrays are on no mesh. What is wrong
      # with the options is said here too, before anything compiles.
      dot_product.check(
        implementation,
        dtype=self.shared.dtype,
        head_width=query.shape[3],
        seq_len=query.shape[1],
        biased=bias is not None,
        dropout=self.dropout > 0,
        cross=self.cross,
      )
      implementation = 'einsum'
    dropout = None
    if train and self.dropout:
      dropout = nn.Dropout(self.dropout, deterministic=False)
    return dot_product.attend(
      query,
      key,
      value,
      ids[0],
      key_segment_ids=ids[1],
      implementation=implementation,
      keys=self._keys,
      bias=bias,
      dropout=dropout,
    )


def project_memory(
  shared: Shared, p: Mapping[str, Any], memory: Float[Array, 'B S M']
) -> tuple[Float[Array, 'R B N S D'], Float[Array, 'R B N S D']]:
  """Keys and values of R cross-attention layers, for a decoder's cache.

  Args:
    shared: What the layers of the model share.
    p: The parameters of the layers, each [R, ...].
    memory: The encoder's output.
  """

  def project(name):
    w = p[f'w_{name}'].astype(shared.dtype)
    y = jnp.einsum('BSM,RMND->RBNSD', memory.astype(shared.dtype), w)
    if shared.use_bias:
      y = y + p[f'b_{name}'].astype(shared.dtype)[:, None, :, None]
    return y

  return project('key'), project('value')
