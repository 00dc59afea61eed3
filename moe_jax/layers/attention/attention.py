"""Multi-head and grouped-query attention, of a sequence to itself or others."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import OptionError, option
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.attention import dot_product
from moe_jax.layers.attention.attention_kind import (
  AttentionBase,
  HeadWidths,
  rms_normed,
)
from moe_jax.layers.attention.cache import KVCache, Memory
from moe_jax.layers.attention.keys import Keys
from moe_jax.layers.positions import NoPositions, Positions
from moe_jax.layers.shared import Shared
from moe_jax.routing.rows import without_nan
from moe_jax.shapes import Array, Bool, Float, Float32, Int, checked

_ROLE = 'attention'
X = TypeVar('X', Array, Array | None)


class Attention(nn.Module):
  """Scaled dot-product attention within segments.

  Attributes:
    options: The options of attention: heads, window, scale and implementation.
    shared: The settings that all layers of the model share.
    positions: The kind of positions that rotate queries and keys.
    causal: Whether a token sees the tokens up to itself, or its whole segment.
    cross: Whether keys and values are an encoder's. Positions then rotate
      nothing, as the tokens of two sequences have no common order.
    dropout: The rate at which attention weights are dropped in training; only
      the implementation 'einsum' has it.
  """

  options: AttentionBase
  shared: Shared = Shared()
  positions: Positions = NoPositions()
  causal: bool = True
  cross: bool = False
  dropout: float = 0.0

  @checked
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
    """The output of attention to tokens of the same segment.

    If causal, a token sees the tokens up to itself. Padding (segment 0) sees
    padding alone, and no other token sees it.

    Args:
      x: Token representations.
      segment_ids: The segment of each token in its row; None: each row is one
        segment.
      positions: The position of each token in its document.
      bias: The bias of relative positions, which is added to the scaled scores.
      train: Turns on dropout.
      memory: The encoder's output, which cross-attention reads.
      key_segment_ids: The segment of each token of the memory or, without one,
        of x. None: `segment_ids` for x; one segment for each row of a memory.

    Raises:
      ValueError: Heads do not divide the width, or the implementation cannot
        serve the length, the bias or this machine.
    """

    def attend(query, key, value):
      ids = segment_ids, key_segment_ids
      return self._attend(query, key, value, ids, bias, train)

    source = memory if self.cross else x
    if key_segment_ids is None and not self.cross:
      source = x = _only_real(x, segment_ids)
    else:
      x = _only_real(x, segment_ids)
      source = _only_real(source, key_segment_ids)
    return self._project_all(x, source, (positions, segment_ids), attend)

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
    """Attends to one layer's cache, to which self-attention adds x first.

    Args:
      x: Representations of the tokens after those of the cache.
      token_mask: False at padding, which comes in front.
      positions: The position of each token.
      bias: The bias that is added to the scaled scores of every slot.
      cache: The cache as `KVCache.begin` returned it.
      layer: The layer's number.
    """
    dtype, cache_holder = self.shared.dtype, [cache]
    segment_ids = token_mask.astype(jnp.int32)

    def attend(query, key, value):
      if self.cross:
        slots = cast(Memory, cache.memory).at(layer)
      else:
        cache_holder[0], slots = cache.append(layer, key, value)
      return dot_product.cached(
        query,
        slots.key.astype(dtype),
        slots.value.astype(dtype),
        # Padded queries must see some keys; which ones does not matter.
        jnp.ones_like(positions) if self.cross else segment_ids,
        slots.filled.astype(jnp.int32),
        keys=self._keys,
        start=cache.length,
        bias=bias,
        sinks=self._sinks(),
        slot_numbers=slots.numbers,
      )

    x = without_nan(token_mask, x)
    source = None if self.cross else x
    y = self._project_all(x, source, (positions, segment_ids), attend)
    return y, cache_holder[0]

  @nn.compact
  def _project_all(self, x, source, position_args, attend):
    """Projects x to queries, and the output of `attend` back.

    The source is projected to keys and values; without one they are None.
    `position_args` are the positions of tokens and their segments.
    """
    M = x.shape[-1]
    c, dtype = self.options.within(M), self.shared.dtype
    x = x.astype(dtype)
    query, key, value = self._query(x, c), None, None
    if source is not None:
      source = source.astype(dtype)
      key_shape, value_shape = c.cached_shapes
      key = self._key_or_value(source, 'key', key_shape)  # [B, S, N, D]
      value = self._key_or_value(source, 'value', value_shape)
    if not self.cross:
      query = self.positions.rotate(query, *position_args)
      key = key if key is None else self.positions.rotate(key, *position_args)
    return self._project_back(attend(query, key, value), M)

  @property
  def _keys(self) -> Keys:
    """The rules for the keys that a token sees, and the scale of scores."""
    return self.options.keys(causal=self.causal, cross=self.cross)

  def _query(self, x, c):
    # Unscaled scores start with the variance of scaled ones (T5).
    width = c.head_widths.scored
    shrink = self._keys.scale**2 * width or 1.0
    axes, shape = ('embed', 'heads', 'kv'), (c.num_heads, width)
    y = self.project(x, 'query', axes, shape, shrink=shrink)
    return self._norm_and_clip(y, 'query', 'heads')

  def _key_or_value(self, x, name, shape):
    y = self.project(x, name, ('embed', 'kv_heads', 'kv'), shape)
    return self._norm_and_clip(y, name, 'kv_heads')

  def _project_back(self, y, width):
    axes = ('heads', 'kv', 'embed')
    return self.project(y, 'out', axes, (width,), residual=True)

  def _norm_and_clip(self, y, name, heads):
    shape, scale = self.options.norm_shape(name, y.shape[-2:]), None
    if shape:
      axes = (heads, 'kv')[-len(shape) :]
      init = parameters.scale(axes, role='norm')
      scale = self.param(f'{name}_norm', init, shape, jnp.float32)
    return self.options.finished(y, scale)

  def project(
    self,
    x: Float[Array, 'B S *M'],
    name: str,
    axes: tuple[str, ...],
    outputs: tuple[int, ...],
    **init: Any,
  ) -> Float[Array, 'B S *N']:
    """Tokens by the kernel w_<name>, [*M, *N], with its bias if it has one.

    Args:
      x: The tokens that are projected.
      name: The name of the projection.
      axes: The logical axes of the kernel.
      outputs: The sizes of a token's result.
      **init: Options of `parameters.kernel`.
    """
    B, S, *inputs = x.shape
    n, shape, dtype = len(inputs), (*inputs, *outputs), self.shared.param_dtype
    kernel = parameters.kernel(
      self.shared,
      axes,
      role=_ROLE,
      in_axis=tuple(range(n)),
      out_axis=tuple(range(n, len(shape))),
      **init,
    )
    w = parameters.matrix(
      self, f'w_{name}', self.shared, kernel, shape, inputs=n
    )
    y = rows_matmul(x.reshape(B * S, -1), w).reshape(B, S, *outputs)
    if not self.options.has_bias(name, self.shared.use_bias):
      return y
    bias = parameters.bias(axes[n:], role=_ROLE)
    b = self.param(f'b_{name}', bias, outputs, dtype)
    return y + b.astype(self.shared.dtype)[None, None]

  def _attend(self, query, key, value, ids, bias, train):
    initial, dropout = self.is_initializing(), None
    if self.dropout and (train or initial):
      dropout = nn.Dropout(self.dropout, deterministic=initial)
    return dot_product.attend(
      query,
      key,
      value,
      ids[0],
      key_segment_ids=ids[1],
      implementation=self.options.implementation,
      keys=self._keys,
      bias=bias,
      sinks=self._sinks(),
      dropout=dropout,
      checked_alone=initial,
    )

  def _sinks(self):
    if not self.options.sinks:
      return None
    init = parameters.bias(('heads',), role=_ROLE)
    return self.param('sinks', init, (self.options.num_heads,), jnp.float32)


def _only_real(x: X, segment_ids: Array | None) -> X | Array:
  """x with zeros at padding, which scores and sums would multiply by 0."""
  if x is None or segment_ids is None:
    return x
  return without_nan(segment_ids > 0, x)


def project_memory(
  shared: Shared,
  options: AttentionBase,
  p: Mapping[str, Any],
  memory: Float[Array, 'B S M'],
) -> tuple[Float[Array, 'R B N S D'], Float[Array, 'R B N S D']]:
  """Keys and values of R cross-attention layers, for a decoder's cache.

  Args:
    shared: The settings that all layers of the model share.
    options: The options of attention, with no size left at 0.
    p: The parameters of the layers, each [R, ...].
    memory: The encoder's output.
  """

  def project(name):
    w = p[f'w_{name}'].astype(shared.dtype)
    y = jnp.einsum('BSM,RMND->RBNSD', memory.astype(shared.dtype), w)
    if (b := p.get(f'b_{name}')) is not None:
      y = y + b.astype(shared.dtype)[:, None, :, None]
    return y

  def finish(y, scale):
    return options.finished(y.swapaxes(-2, -3), scale).swapaxes(-2, -3)

  key = jax.vmap(finish)(project('key'), p.get('key_norm'))
  return key, jax.vmap(lambda y: finish(y, None))(project('value'))


@dataclasses.dataclass(frozen=True)
class AttentionOptions(AttentionBase):
  """The options of attention whose heads have keys and values of their own."""

  PROJECTIONS: ClassVar[tuple[str, ...]] = ('query', 'key', 'value', 'out')

  num_kv_heads: int = option(
    0,
    'Number of attention heads of keys and values, a divisor of num_heads; '
    'consecutive query heads share one (arXiv:2305.13245); 0: num_heads.',
    minimum=0,
  )
  head_width: int = option(
    0,
    'Width D of an attention head; 0: the width of the model / num_heads.',
    minimum=0,
  )
  _: dataclasses.KW_ONLY
  scale: str = option(
    'head_width',
    "Factor of attention scores: 'head_width' is head_width^-0.5; 'none' is 1, "
    "as in T5, whose query kernels start smaller instead; or 'fixed'.",
    choices=('fixed', 'head_width', 'none'),
  )
  fixed_scale: float = option(
    1.0,
    'Factor of attention scores (attention_multiplier of Granite 3.0).',
    above=0,
  )
  qk_norm: str = option(
    'none',
    'Division of queries and keys by their root mean square, with a learned '
    "scale: 'none'; 'head', over the width of each head (Qwen3, "
    "arXiv:2505.09388); or 'all', over the values of all heads together "
    '(OLMoE, arXiv:2409.02060).',
    choices=('all', 'head', 'none'),
  )
  qk_norm_epsilon: float = option(
    1e-6,
    'Number added to the mean square of queries and keys before its root is '
    'taken.',
    above=0,
  )
  clip: float = option(
    0.0,
    'Largest absolute value of queries, keys and values, after their norm; '
    'larger ones are clipped (clip_qkv of OLMo, arXiv:2402.00838); 0.0 clips '
    'nothing.',
    minimum=0,
  )

  def problems(self) -> Iterator[str]:
    """The problem of query heads that key heads do not share evenly."""
    yield from super().problems()
    if self.num_kv_heads and self.num_heads % self.num_kv_heads:
      yield (
        f'num_kv_heads={self.num_kv_heads} does not divide '
        f'num_heads={self.num_heads}'
      )
    if self.scale != 'fixed':
      yield from self.in_vain("unless scale is 'fixed'", 'fixed_scale')

  @property
  def module(self) -> type[nn.Module]:
    return Attention

  def within(self, width: int) -> Self:
    """The options with the width of a head that the model's gives.

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
    """Fewer heads serve a cache alone."""
    return dataclasses.replace(super().for_encoder(), num_kv_heads=0)

  @property
  def score_scale(self) -> float:
    return 0.0 if self.scale == 'head_width' else self.fixed_scale

  @property
  def head_widths(self) -> HeadWidths:
    return HeadWidths(self.head_width, self.head_width)

  @property
  def rotated_width(self) -> int:
    return self.head_width

  @property
  def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """Keys and values are stored."""
    shape = self.num_kv_heads, self.head_width
    return shape, shape

  @property
  def projected_values(self) -> int:
    return self.num_heads * self.head_width + self.cached_values

  def kernel_values(self, width: int) -> int:
    c = self.within(width)
    return 2 * width * c.head_width * (c.num_heads + c.num_kv_heads)

  def shrunk(self) -> Self:
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
    if name == 'value' or self.qk_norm == 'none':
      return ()
    return tuple(heads) if self.qk_norm == 'all' else (heads[-1],)

  def finished(
    self, x: Float[Array, '*B N D'], scale: Float[Array, '*n'] | None
  ) -> Float[Array, '*B N D']:
    """Heads are normalised, then clipped."""
    if scale is not None:
      x = rms_normed(x, scale, self.qk_norm_epsilon)
    return jnp.clip(x, -self.clip, self.clip) if self.clip else x
