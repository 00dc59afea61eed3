"""Multi-head latent attention: keys and values expand from a latent vector.

Source: section 2.1 of arXiv:2405.04434 (DeepSeek-V2). A cache keeps the vector
and one rotated key that all heads share, and a generated token attends to the
vectors without expanding them: the kernel that expands keys multiplies its
query instead, and the kernel that expands values the weighted sum of vectors.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Self

import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import option
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.attention.attention import Attention, AttentionBase
from moe_jax.layers.attention.keys import Keys
from moe_jax.layers.norms import rms_normed


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
    'Width R of the cached vector that keys and values expand from.',
    minimum=1,
  )
  plain_width: int = option(
    128, 'Width of the part of a head that has no positions.', minimum=1
  )
  rotary_width: int = option(
    64,
    "Width of a head's part that positions rotate; all heads share its key.",
    minimum=1,
  )
  value_width: int = option(128, 'Width of the values of a head.', minimum=1)
  norm_epsilon: float = option(
    1e-6,
    'Number added to the mean square of the vectors that queries, keys and '
    'values expand from, before its root is taken.',
    above=0,
  )

  def problems(self) -> Iterator[str]:
    """Yields a text if `biases` names a projection that is left out."""
    yield from super().problems()
    if 'query_down' in self._bias_names and not self.query_rank:
      text = f"biases={self.biases!r} names 'query_down'"
      yield f'{text}, which query_rank=0 leaves out'

  @property
  def module(self) -> type[nn.Module]:
    return LatentAttention

  @property
  def head_widths(self) -> tuple[int, int]:
    return self.plain_width + self.rotary_width, self.value_width

  @property
  def cached_width(self) -> int:
    """The width of what a layer caches: a latent vector and a rotated key."""
    return self.kv_rank + self.rotary_width

  @property
  def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes, (heads, width), of what the cache keeps for a token.

    Keys are one latent vector with a rotated key, which all heads share, and
    values have width 0.
    """
    return (1, self.cached_width), (1, 0)

  @property
  def decoding_products(self) -> int:
    return 2 * self.num_heads * self.cached_width

  @property
  def projected_values(self) -> int:
    """The base's count, plus a latent query and all heads' keys and values."""
    expanded = self.num_heads * sum(self.head_widths)
    return super().projected_values + expanded + self.query_rank

  def kernel_values(self, width: int) -> int:
    H, (scored, value) = self.num_heads, self.head_widths
    total = super().kernel_values(width)
    total += self.kv_rank * H * (self.plain_width + value)
    if self.query_rank:
      total += self.query_rank * (width + H * scored) - width * H * scored
    return total

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
    """Whether `num_queries` tokens attend without expanding cached vectors.

    Multiply-adds decide: a query has longer products with latent vectors than
    with keys, but expanding these costs as much for one query as for many.
    """
    expansion_cost = self.kv_rank * (self.plain_width + self.value_width)
    extra_per_query = 2 * self.cached_width - sum(self.head_widths)
    return num_queries * extra_per_query <= expansion_cost


class LatentAttention(Attention):
  """Scaled dot-product attention to keys that expand from latent vectors.

  Attributes:
    options: The options of latent attention.
  """

  options: LatentOptions = LatentOptions()

  @property
  def _keys(self) -> Keys:
    """The rules for which keys a query sees, and a scale with YaRN's factor."""
    scored, _ = self.options.head_widths
    scale = scored**-0.5 * self.positions.scaling.latent_factor
    return super()._keys._replace(scale=scale)

  def _queries(self, x, position_args):
    c, inputs, name = self.options, 'embed', 'query'
    if c.query_rank:
      x = self._project(x, 'query_down', ('embed', 'latent'), (c.query_rank,))
      x, inputs, name = self._normed(x, 'query_norm'), 'latent', 'query_up'
    shape = c.num_heads, c.head_widths[0]
    query = self._project(x, name, (inputs, 'heads', 'kv'), shape)
    plain, rotary = jnp.split(query, [c.plain_width], axis=-1)
    rotary = self.positions.rotate(rotary, *position_args)
    return jnp.concatenate([plain, rotary], axis=-1)

  def _cached(self, x, position_args):
    """The latent vector and the rotated key of each token, [B, S, 1, R + r].

    R is the width of a latent vector, and r that of a rotated key. The second
    result, the values of the cache, has width 0.
    """
    c, axes = self.options, ('embed', 'latent')
    short = self._project(x, 'kv_down', axes, (c.cached_width,))[:, :, None]
    vector, key = jnp.split(short, [c.kv_rank], axis=-1)
    key = self.positions.rotate(key, *position_args)
    vector = self._normed(vector, 'kv_norm')
    short = jnp.concatenate([vector, key], axis=-1)
    return short, short[..., :0]

  def _normed(self, x, name):
    """x [..., R] divided by its root mean square, times the scale `name`."""
    init = parameters.scale(('latent',), role='norm')
    scale = self.param(name, init, x.shape[-1:], jnp.float32)
    return rms_normed(x, scale, self.options.norm_epsilon)

  def _up_kernel(self, dtype):
    """The kernel [R, H, n + v] that expands latent vectors of width R.

    n is the width of a head's unrotated key, and v that of its value; the
    columns of the key come first.
    """
    c, axes = self.options, ('latent', 'heads', 'kv')
    shape = c.num_heads, c.plain_width + c.value_width
    w = self._kernel('kv_up', axes, (c.kv_rank,), shape)
    return w.reshape(c.kv_rank, *shape).astype(dtype)

  def _expanded(self, key, value):
    """The keys [B, S, H, n + r] and values [B, S, H, v] of all heads.

    `key` has latent vectors with rotated keys, [B, S, 1, R + r]; `value` has
    no numbers. n is the width of a key's unrotated numbers, r that of its
    rotated ones, and v that of a value.
    """
    c, kernel = self.options, self._up_kernel(key.dtype)
    vector, rotary = jnp.split(key, [c.kv_rank], axis=-1)
    (B, S, _, R), (H, D) = vector.shape, kernel.shape[1:]
    kv = rows_matmul(vector.reshape(B * S, R), kernel.reshape(R, H * D))
    plain, value = jnp.split(kv.reshape(B, S, H, D), [c.plain_width], axis=-1)
    rotary = jnp.broadcast_to(rotary, (B, S, H, c.rotary_width))
    return jnp.concatenate([plain, rotary], axis=-1), value

  def _attend_slots(self, attention, query, key, value):
    """The result [B, T, H, v] of attention to cached latent vectors.

    For few queries the vectors are not expanded: the kernel of the keys
    multiplies the queries, and that of the values the weighted sums of vectors.

    Args:
      attention: The function attention(query, key, value).
      query: The queries [B, T, H, n + r], whose last r numbers are rotated.
      key: The latent vectors with their rotated keys, [B, 1, S, R + r].
      value: An array [B, 1, S, 0] without numbers.
    """
    c = self.options
    if not c.absorbs(query.shape[1]):
      key, value = self._expanded(key.swapaxes(1, 2), value)
      return attention(query, key.swapaxes(1, 2), value.swapaxes(1, 2))
    kernel = self._up_kernel(key.dtype)
    up_key, up_value = jnp.split(kernel, [c.plain_width], axis=-1)
    plain, rotary = jnp.split(query, [c.plain_width], axis=-1)
    plain = jnp.einsum('BTHn,RHn->BTHR', plain, up_key)
    query = jnp.concatenate([plain, rotary], axis=-1)
    # The values include the rotated keys, as a slice without them would be a
    # copy of the cache; the sums of the rotated keys are dropped afterwards.
    sums = attention(query, key, key)[..., : c.kv_rank]
    return jnp.einsum('BTHR,RHv->BTHv', sums, up_value)
