"""The options of attention whose heads have keys and values of their own."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Self

import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers.attention.attention import Attention
from moe_jax.layers.attention.attention_kind import AttentionBase, HeadWidths
from moe_jax.layers.attention.projected import rms_normed
from moe_jax.options import OptionError, above, at_least, one_of, option
from moe_jax.shapes import Array, Float


@dataclasses.dataclass(frozen=True)
class AttentionOptions(AttentionBase):
  """The options of attention whose heads have keys and values of their own."""

  PROJECTIONS: ClassVar[tuple[str, ...]] = ('query', 'key', 'value', 'out')

  num_kv_heads: int = option(
    0,
    'Number of attention heads of keys and values, a divisor of num_heads; '
    'consecutive query heads share one (arXiv:2305.13245); 0: num_heads.',
    at_least(0),
  )
  head_width: int = option(
    0,
    'Width D of an attention head; 0: the width of the model / num_heads.',
    at_least(0),
  )
  _: dataclasses.KW_ONLY
  scale: str = option(
    'head_width',
    "Factor of attention scores: 'head_width' is head_width^-0.5; 'none' is 1, "
    "as in T5, whose query kernels start smaller instead; or 'fixed'.",
    one_of('fixed', 'head_width', 'none'),
  )
  fixed_scale: float = option(
    1.0,
    'Factor of attention scores (attention_multiplier of Granite 3.0).',
    above(0),
    when={'scale': ('fixed',)},
  )
  qk_norm: str = option(
    'none',
    'Division of queries and keys by their root mean square, with a learned '
    "scale: 'none'; 'head', over the width of each head (Qwen3, "
    "arXiv:2505.09388); or 'all', over the values of all heads together "
    '(OLMoE, arXiv:2409.02060).',
    one_of('all', 'head', 'none'),
  )
  qk_norm_epsilon: float = option(
    1e-6,
    'Number added to the mean square of queries and keys before its root is '
    'taken.',
    above(0),
    when={'qk_norm': ('all', 'head')},
  )
  clip: float = option(
    0.0,
    'Largest absolute value of queries, keys and values, after their norm; '
    'larger ones are clipped (clip_qkv of OLMo, arXiv:2402.00838); 0.0 clips '
    'nothing.',
    at_least(0),
  )

  def problems(self) -> Iterator[str]:
    """The problem of query heads that key heads do not share evenly."""
    yield from super().problems()
    if self.num_kv_heads and self.num_heads % self.num_kv_heads:
      yield (
        f'num_kv_heads={self.num_kv_heads} does not divide '
        f'num_heads={self.num_heads}'
      )

  @property
  def module(self) -> type[nn.Module]:
    """See `AttentionBase.module`."""
    return Attention

  def within(self, width: int) -> Self:
    """See `AttentionBase.within`.

    Raises:
      OptionError: head_width is 0, and num_heads does not divide the width.
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

  def for_encoder(self) -> Self:
    """See `AttentionBase.for_encoder`; fewer heads serve a cache alone."""
    return dataclasses.replace(super().for_encoder(), num_kv_heads=0)

  @property
  def score_scale(self) -> float:
    """See `AttentionBase.score_scale`."""
    return 0.0 if self.scale == 'head_width' else self.fixed_scale

  @property
  def head_widths(self) -> HeadWidths:
    """See `AttentionBase.head_widths`."""
    return HeadWidths(self.head_width, self.head_width)

  @property
  def rotated_width(self) -> int:
    """See `AttentionBase.rotated_width`."""
    return self.head_width

  @property
  def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """See `AttentionBase.cached_shapes`: keys, and values."""
    shape = self.num_kv_heads, self.head_width
    return shape, shape

  @property
  def projected_values(self) -> int:
    """See `AttentionBase.projected_values`."""
    return self.num_heads * self.head_width + self.cached_values

  def kernel_values(self, width: int) -> int:
    """See `AttentionBase.kernel_values`."""
    c = self.within(width)
    return 2 * width * c.head_width * (c.num_heads + c.num_kv_heads)

  def shrunk(self) -> Self:
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

  def norm_shape(self, name: str, heads: tuple[int, ...]) -> tuple[int, ...]:
    """See `AttentionBase.norm_shape`."""
    if name == 'value' or self.qk_norm == 'none':
      return ()
    return tuple(heads) if self.qk_norm == 'all' else (heads[-1],)

  def finished(
    self, x: Float[Array, '*B N D'], scale: Float[Array, '*n'] | None
  ) -> Float[Array, '*B N D']:
    """See `AttentionBase.finished`: with their norm, then clipped."""
    if scale is not None:
      x = rms_normed(x, scale, self.qk_norm_epsilon)
    return jnp.clip(x, -self.clip, self.clip) if self.clip else x
