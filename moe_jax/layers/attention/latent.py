"""Multi-head latent attention: keys and values expand from a short vector.

Source: section 2.1 of arXiv:2405.04434 (DeepSeek-V2). A cache keeps the vector
and one rotated key that all heads share, and a generated token attends to them
without expanding them: its query goes through the kernel of the keys, and the
weighted sum of vectors through that of the values.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, Self

import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import option
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.attention import dot_product
from moe_jax.layers.attention.attention import Attention
from moe_jax.layers.attention.attention_kind import (
  AttentionBase,
  HeadWidths,
  rms_normed,
)
from moe_jax.layers.attention.cache import KVCache
from moe_jax.layers.attention.keys import Keys
from moe_jax.routing.rows import without_nan
from moe_jax.shapes import Array, Bool, Float, Float32, Int, checked

_ROLE = 'attention'


@dataclasses.dataclass(frozen=True)
class LatentOptions(AttentionBase):
  """The options of multi-head latent attention (arXiv:2405.04434)."""

  PROJECTIONS: ClassVar[tuple[str, ...]] = ('query_down', 'kv_down', 'out')
  ROTATED: ClassVar[str] = 'rotary_width'
  crosses: ClassVar[bool] = False

  query_rank: int = option(
    0,
    'Width of the vector that queries expand from; 0: queries are projections '
    'of tokens.',
    minimum=0,
  )
  kv_rank: int = option(
    512,
    'Width R of the vector that keys and values expand from, which the cache '
    'keeps.',
    minimum=1,
  )
  plain_width: int = option(
    128,
    'Width of the part of a head that has no positions.',
    minimum=1,
  )
  rotary_width: int = option(
    64,
    'Width of the part of a head that positions rotate; its key is the same '
    'for all heads.',
    minimum=1,
  )
  value_width: int = option(
    128,
    'Width of the values of a head.',
    minimum=1,
  )
  norm_epsilon: float = option(
    1e-6,
    'Number added to the mean square of the vectors that queries, keys and '
    'values expand from, before its root is taken.',
    above=0,
  )

  def problems(self) -> Iterator[str]:
    """The problem of a bias for a projection that is left out."""
    yield from super().problems()
    if 'query_down' in self._bias_names and not self.query_rank:
      yield (
        f"biases={self.biases!r} names 'query_down', which query_rank=0 leaves "
        'out'
      )

  @property
  def module(self) -> type[nn.Module]:
    return LatentAttention

  @property
  def head_widths(self) -> HeadWidths:
    return HeadWidths(self.plain_width + self.rotary_width, self.value_width)

  @property
  def rotated_width(self) -> int:
    return self.rotary_width

  @property
  def cached_width(self) -> int:
    """The number of values that the cache has of a token in a layer."""
    return self.kv_rank + self.rotary_width

  @property
  def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """Keys alone are stored."""
    return (1, self.cached_width), (1, 0)

  @property
  def uncompressed_values(self) -> int:
    return self.num_heads * sum(self.head_widths)

  @property
  def decoding_products(self) -> int:
    return 2 * self.num_heads * self.cached_width

  @property
  def projected_values(self) -> int:
    """Keys and values are expanded."""
    scored, value = self.head_widths
    short = self.query_rank + self.cached_width
    return self.num_heads * (2 * scored + value) + short

  def kernel_values(self, width: int) -> int:
    H, (scored, value) = self.num_heads, self.head_widths
    queries = width * H * scored
    if self.query_rank:
      queries = self.query_rank * (width + H * scored)
    expanded = self.kv_rank * H * (self.plain_width + value)
    return queries + width * (self.cached_width + H * value) + expanded

  def shrunk(self) -> Self:
    return dataclasses.replace(
      self,
      num_heads=4,
      query_rank=24 if self.query_rank else 0,
      kv_rank=16,
      plain_width=8,
      rotary_width=4,
      value_width=8,
      window=min(self.window, 8),
      implementation='auto',
    )

  def absorbs(self, num_queries: int) -> bool:
    """Whether so many queries of a step meet the cache without expanding it.

    Multiply-adds decide: a query has longer products with the short vectors,
    but to expand these costs as much for one query as for many.
    """
    expansion_cost = self.kv_rank * (self.plain_width + self.value_width)
    extra_per_query = 2 * self.cached_width - sum(self.head_widths)
    return num_queries * extra_per_query <= expansion_cost


class LatentAttention(Attention):
  """Scaled dot-product attention to keys that expand from short vectors.

  Attributes:
    options: The options of latent attention.
  """

  options: LatentOptions = LatentOptions()

  @checked
  def decode(
    self,
    x: Float[Array, 'B T M'],
    token_mask: Bool[Array, 'B T'],
    positions: Int[Array, 'B T'],
    bias: Float32[Array, 'H T S'] | None,
    cache: KVCache,
    layer: int | Int[Array, ''],
  ) -> tuple[Float[Array, 'B T M'], KVCache]:
    cache_holder, segment_ids = [cache], token_mask.astype(jnp.int32)

    def attend(query, short, kernel):
      short = short[:, :, None]  # [B, T, 1, R + r]
      cache_holder[0], slots = cache.append(layer, short, short[..., :0])
      source = slots.key.astype(query.dtype)
      attention = functools.partial(
        dot_product.cached,
        segment_ids=segment_ids,
        key_segment_ids=slots.filled.astype(jnp.int32),
        keys=self._keys,
        start=cache.length,
        bias=bias,
        sinks=self._sinks(),
        slot_numbers=slots.numbers,
      )
      if self.options.absorbs(x.shape[1]):
        return self._absorbed(query, source, kernel, attention)
      key, value = self._expanded(source[:, 0], kernel)
      return attention(query, key.swapaxes(1, 2), value.swapaxes(1, 2))

    x = without_nan(token_mask, x)
    y = self._project_short(x, (positions, segment_ids), attend)
    return y, cache_holder[0]

  def _project_all(self, x, source, position_args, attend):
    """Keys and values are expanded."""
    del source  # it is x

    def attend_expanded(query, short, kernel):
      return attend(query, *self._expanded(short, kernel))

    return self._project_short(x, position_args, attend_expanded)

  @nn.compact
  def _project_short(self, x, position_args, attend):
    """Projects x to queries and short vectors, and the output of `attend` back.

    `position_args` are the positions of tokens and their segments.
    `attend` gets queries [B, T, H, n + r], short vectors [B, T, R + r], of
    which r numbers are the rotated key of all heads, and the kernel
    [R, H, n + v] that expands the others.
    """
    c, M = self.options, x.shape[-1]
    x = x.astype(self.shared.dtype)
    query = self._queries(x)
    plain, rotary = jnp.split(query, [c.plain_width], axis=-1)
    rotary = self.positions.rotate(rotary, *position_args)
    query = jnp.concatenate([plain, rotary], axis=-1)
    short = self._project_down(x, 'kv_down', c.cached_width)
    vector, key = jnp.split(short, [c.kv_rank], axis=-1)
    key = self.positions.rotate(key[:, :, None], *position_args)[:, :, 0]
    vector = self._normed(vector, 'kv_norm')
    short = jnp.concatenate([vector, key], axis=-1)
    kernel = self._expanding_kernel().astype(x.dtype)
    return self._project_back(attend(query, short, kernel), M)

  def _queries(self, x: Float[Array, 'B T M']) -> Float[Array, 'B T H D']:
    """The queries of all heads, before their positions rotate them."""
    c = self.options
    shape = c.num_heads, c.head_widths.scored
    if not c.query_rank:
      return self.project(x, 'query', ('embed', 'heads', 'kv'), shape)
    vector = self._project_down(x, 'query_down', c.query_rank)
    vector = self._normed(vector, 'query_norm')
    return self.project(vector, 'query_up', ('latent', 'heads', 'kv'), shape)

  def _project_down(self, x, name, width):
    """The short vectors of tokens, [B, T, R]."""
    return self.project(x, name, ('embed', 'latent'), (width,))

  def _normed(self, x, name):
    """Vectors over their root mean square, times the scale `name`."""
    init = parameters.scale(('latent',), role='norm')
    scale = self.param(name, init, x.shape[-1:], jnp.float32)
    return rms_normed(x, scale, self.options.norm_epsilon)

  def _expanding_kernel(self) -> Float[Array, 'R H D']:
    """The kernel from short vectors to keys, then values, of each head."""
    c = self.options
    shape = c.kv_rank, c.num_heads, c.plain_width + c.value_width
    init = parameters.kernel(
      self.shared,
      ('latent', 'heads', 'kv'),
      role=_ROLE,
      in_axis=0,
      out_axis=(1, 2),
    )
    w = parameters.matrix(self, 'w_kv_up', self.shared, init, shape)
    return w.reshape(shape)

  def _expanded(
    self, short: Float[Array, 'B S C'], kernel: Float[Array, 'R H D']
  ) -> tuple[Float[Array, 'B S H _'], Float[Array, 'B S H _']]:
    """The keys and the values of all heads."""
    c = self.options
    vector, rotary = jnp.split(short, [c.kv_rank], axis=-1)
    (B, S, R), (H, D) = vector.shape, kernel.shape[1:]
    kv = rows_matmul(vector.reshape(B * S, R), kernel.reshape(R, H * D))
    key, value = jnp.split(kv.reshape(B, S, H, D), [c.plain_width], axis=-1)
    rotary_keys = jnp.broadcast_to(
      rotary[:, :, None], (B, S, H, c.rotary_width)
    )
    return jnp.concatenate([key, rotary_keys], axis=-1), value

  def _absorbed(self, query, short, kernel, attention):
    """Attention to short vectors [B, 1, S, R + r], which stay as they are.

    The kernel of the keys meets the queries, and that of the values the sums.
    """
    c = self.options
    key, value = jnp.split(kernel, [c.plain_width], axis=-1)
    plain, rotary = jnp.split(query, [c.plain_width], axis=-1)
    plain = jnp.einsum('BTHn,RHn->BTHR', plain, key)
    query = jnp.concatenate([plain, rotary], axis=-1)
    # The sums of rotated keys are dropped: a slice would copy the cache.
    sums = attention(query, short, short)[..., : c.kv_rank]
    return jnp.einsum('BTHR,RHv->BTHv', sums, value)

  @property
  def _keys(self) -> Keys:
    """YaRN multiplies the scores, too."""
    keys = self.options.keys(causal=self.causal)
    scale = self.options.head_widths.scored**-0.5
    return keys._replace(scale=scale * self.positions.latent_factor)
