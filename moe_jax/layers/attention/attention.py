"""Multi-head and grouped-query attention, of a sequence to itself or another.

`AttentionBase` is the base of the options of all kinds of attention. Multi-head
latent attention is a kind of its own, in `latent.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar, cast

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import OptionError, Options, option
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.attention import dot_product
from moe_jax.layers.attention.cache import KVCache, Slots
from moe_jax.layers.attention.keys import Keys
from moe_jax.layers.norms import rms_normed
from moe_jax.layers.positions import NoPositions, Positions
from moe_jax.layers.shared import Shared
from moe_jax.routing.rows import without_nan
from moe_jax.shapes import Array, Bool, Float, Float32, Int, checked

_ROLE = 'attention'
# The name under which a remat policy finds the weighted means of values.
OUTPUT = 'attention_output'
X = TypeVar('X', Array, Array | None)


@dataclasses.dataclass(frozen=True)
class AttentionBase(Options):
  """The base of the options of all kinds of attention.

  Sizes of 0 stand for sizes that follow from the model's width; `within` fills
  them in.

  Attributes:
    PROJECTIONS: The names of the projections that may add a bias.
    ROTATED: The name of the option for the width of the part of a head that
      rotary positions may rotate.
    crosses: Whether a decoder's layers can attend to an encoder by this kind of
      attention.
  """

  PROJECTIONS: ClassVar[tuple[str, ...]] = ()
  ROTATED: ClassVar[str] = 'head_width'
  crosses: ClassVar[bool] = True

  num_heads: int = option(4, 'Number H of attention heads.', minimum=1)
  _: dataclasses.KW_ONLY
  window: int = option(
    0,
    'Number of tokens that a token of a causal stack attends to, itself '
    'included (Mistral, arXiv:2310.06825); 0: all up to itself. An encoder has '
    'no window.',
    minimum=0,
  )
  full_layers: str = option(
    'none',
    'Layers whose tokens see all tokens up to themselves in spite of '
    "`window`, written like moe.layers: 'every 2' in gpt-oss, 'none', 'all'.",
    required=True,
  )
  sinks: bool = option(
    False,
    'Whether each head has a learned logit beside the scores in its softmax, '
    'so that a token can attend to nothing (gpt-oss, arXiv:2508.10925).',
  )
  biases: str = option(
    'model',
    "Projections that add a bias: 'model' (all or none, by model.use_bias), "
    "'all', 'none', or names of projections with commas between, such as "
    "'query, key, value' (Qwen2; arXiv:2407.10671).",
    required=True,
  )
  implementation: str = option(
    'auto',
    "Implementation of attention: 'einsum' (any option; keeps an array of all "
    "scores); 'blocks' (blocks of queries, whose scores are computed again in "
    "the backward pass); 'xla' (jax.nn.dot_product_attention); 'cudnn' (the "
    "same with NVIDIA's kernels, in half precision; packed rows need a mask "
    "[B, 1, T, T]); 'splash' (a TPU kernel, emulated and slow elsewhere); or "
    "'auto': blocks on a CPU, splash on a TPU and cudnn on a GPU if they "
    'support the options, else einsum.',
    choices=dot_product.IMPLEMENTATIONS,
    same_function=True,
  )

  def problems(self) -> Iterator[str]:
    """Yields a text if `biases` names a projection that does not exist."""
    keywords, projections = ['model', 'all', 'none'], self.PROJECTIONS
    if self.biases not in keywords and not self._bias_names <= {*projections}:
      yield (
        f'biases={self.biases!r} must be one of {keywords}, or names of '
        f'{[*projections]} with commas between'
      )

  @property
  def _bias_names(self) -> set[str]:
    return {name.strip() for name in self.biases.split(',')}

  def has_bias(self, projection: str, use_bias: bool) -> bool:
    """Whether the projection of this name adds a bias.

    False for names that `PROJECTIONS` lacks. `use_bias` is the model's option,
    which decides where `biases` is 'model'.
    """
    if projection not in self.PROJECTIONS:
      return False
    if self.biases == 'model':
      return use_bias
    return self.biases == 'all' or projection in self._bias_names

  @property
  def module(self) -> type[nn.Module]:
    """The class of the attention module, whose `options` are these options."""
    raise NotImplementedError

  def within(self, width: int) -> Self:
    """The options with sizes of 0 filled in for a model of M = `width`."""
    return self

  def for_encoder(self) -> Self:
    """A decoder's options without the window, which no encoder has."""
    return dataclasses.replace(self, window=0, full_layers='none')

  @property
  def head_widths(self) -> tuple[int, int]:
    """The width of a head's queries and keys, and the width of its values."""
    raise NotImplementedError

  @property
  def score_scale(self) -> float:
    """The factor of scores; 0.0 stands for 1 / sqrt(width of a key)."""
    return 0.0

  @property
  def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """The number of cached heads and their width, for keys and for values."""
    raise NotImplementedError

  @property
  def cached_values(self) -> int:
    """How many numbers, of keys and values, a layer caches for a token."""
    return sum(heads * width for heads, width in self.cached_shapes)

  @property
  def decoding_products(self) -> int:
    """The multiply-adds, in one layer, of a new token with one cached token."""
    return self.num_heads * sum(self.head_widths)

  @property
  def projected_values(self) -> int:
    """How many numbers of a token's projections the backward pass needs.

    They are those of one layer: queries, and what the layer would cache.
    """
    return self.num_heads * self.head_widths[0] + self.cached_values

  def kernel_values(self, width: int) -> int:
    """The number of parameters in one layer's kernels, where M is `width`."""
    c = self.within(width)
    return width * (c.num_heads * sum(c.head_widths) + c.cached_values)


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
      bias: The bias of relative positions on the scaled scores; None: no bias.
      train: Turns on dropout.
      memory: The encoder's output in cross-attention; None in self-attention.
      key_segment_ids: The segment of each token of the memory or, without a
        memory, of x. None: `segment_ids` for x; one segment for each row of a
        memory.

    Raises:
      ValueError: Heads do not divide the width, or the implementation cannot
        serve the length, the bias or this machine.
    """

    def attend(query, *cached):
      initial, dropout = self.is_initializing(), None
      if self.dropout and (train or initial):
        dropout = nn.Dropout(self.dropout, deterministic=initial)
      return dot_product.attend(
        query,
        *self._expanded(*cached),
        segment_ids,
        key_segment_ids=key_segment_ids,
        implementation=self.options.implementation,
        keys=self._keys,
        bias=bias,
        sinks=self._sinks(),
        dropout=dropout,
        checked_alone=initial,
      )

    source = memory if self.cross else x
    x = _only_real(x, segment_ids)
    if key_segment_ids is None and not self.cross:
      source = x
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

    Cross-attention reads `cache.memory` instead, and adds nothing.

    Args:
      x: Representations of the tokens after those of the cache.
      token_mask: False at padding, which comes in front.
      positions: The position of each token.
      bias: The bias on the scaled scores of every slot; None: no bias.
      cache: The cache as `KVCache.begin` returned it.
      layer: The index of the layer.

    Returns:
      The output of attention, and the cache with the keys and values of x.
    """
    dtype, cache_holder = self.shared.dtype, [cache]
    segment_ids = token_mask.astype(jnp.int32)

    def attend(query, *new):
      if self.cross:
        slots = cast(Slots, cache.memory).at(layer)
      else:
        cache_holder[0], slots = cache.append(layer, *new)
      attention = functools.partial(
        dot_product.cached,
        # Padded queries must see some keys; which ones does not matter.
        segment_ids=jnp.ones_like(positions) if self.cross else segment_ids,
        key_segment_ids=slots.filled.astype(jnp.int32),
        keys=self._keys,
        start=cache.length,
        bias=bias,
        sinks=self._sinks(),
        slot_numbers=slots.numbers,
      )
      key, value = slots.key.astype(dtype), slots.value.astype(dtype)
      return self._attend_slots(attention, query, key, value)

    x = without_nan(token_mask, x)
    source = None if self.cross else x
    y = self._project_all(x, source, (positions, segment_ids), attend)
    return y, cache_holder[0]

  @nn.compact
  def _project_all(self, x, source, position_args, attend):
    """The output [B, T, M] of `attend`, projected to the width M of x.

    Args:
      x: Tokens [B, T, M], which are projected to queries.
      source: Tokens [B, S, M], which are projected to what a cache keeps; None
        where the cache has everything already.
      position_args: The pair (positions, segment_ids) of the tokens, each
        [B, T]; the second may be None, for one segment a row.
      attend: The function attend(query, key, value) that returns weighted means
        of values of width U, [B, T, H, U]. Queries are [B, T, H, D]; key and
        value are those that a cache keeps, [B, S, N, _] of N heads, or None
        without a `source`.
    """
    dtype, cached = self.shared.dtype, (None, None)
    query = self._queries(x.astype(dtype), position_args)
    if source is not None:
      cached = self._cached(source.astype(dtype), position_args)
    y = checkpoint_name(attend(query, *cached), OUTPUT)
    axes = ('heads', 'kv', 'embed')
    return self._project(y, 'out', axes, x.shape[-1:], residual=True)

  @property
  def _keys(self) -> Keys:
    """The rules for the keys that a token sees, and the scale of scores.

    The window of the options applies to causal layers alone.
    """
    c, causal = self.options, self.causal
    return Keys(causal, c.window if causal else 0, c.score_scale, self.cross)

  def _queries(self, x, position_args):
    """The queries [B, T, H, D] of tokens x [B, T, M].

    Self-attention rotates them by `position_args`, (positions, segment_ids).
    """
    c = self.options.within(x.shape[-1])
    width, _ = c.head_widths
    # Unscaled scores start with the variance of scaled ones (T5).
    shrink = self._keys.scale**2 * width or 1.0
    shape = c.num_heads, width
    query = self._heads(x, 'query', 'heads', shape, shrink=shrink)
    return query if self.cross else self.positions.rotate(query, *position_args)

  def _cached(self, x, position_args):
    """The keys and values, [B, S, N, D] each, that a cache keeps of tokens x.

    x is [B, S, M], and N the number of heads of keys. Self-attention rotates
    keys by `position_args`, (positions, segment_ids).
    """
    shapes = self.options.within(x.shape[-1]).cached_shapes
    key = self._heads(x, 'key', 'kv_heads', shapes[0])
    value = self._heads(x, 'value', 'kv_heads', shapes[1])
    if not self.cross:
      key = self.positions.rotate(key, *position_args)
    return key, value

  def _expanded(self, key, value):
    """The keys and values to attend to, from those that a cache keeps.

    All are [B, S, N, _] of N heads. Here both are the same; latent attention
    expands them.
    """
    return key, value

  def _attend_slots(self, attention, query, key, value):
    """The result of attention(query, key, value) on cached keys and values.

    Queries are [B, T, H, D], keys and values [B, N, S, _] of N heads, and the
    result [B, T, H, U] of the width U of values. A subclass may cache something
    else than keys and values.
    """
    return attention(query, key, value)

  def _heads(self, x, name, heads, shape, **init):
    """The queries, keys or values [B, S, N, D] of tokens x [B, S, M].

    They are normalised and clipped as the options say.

    Args:
      x: The tokens.
      name: The projection: 'query', 'key' or 'value'; values have no norm.
      heads: The logical axis of heads, 'heads' or 'kv_heads'.
      shape: The number N of heads and their width D.
      **init: Options of `parameters.kernel`, such as `shrink`.
    """
    options, scale = cast(AttentionOptions, self.options), None
    y = self._project(x, name, ('embed', heads, 'kv'), shape, **init)
    if name != 'value' and options.qk_norm != 'none':
      axes = (heads, 'kv') if options.qk_norm == 'all' else ('kv',)
      init = parameters.scale(axes, role='norm')
      shape = y.shape[-len(axes) :]
      scale = self.param(f'{name}_norm', init, shape, jnp.float32)
    return options.finished(y, scale)

  def _project(self, x, name, axes, outputs, **init):
    """The products [B, S, *outputs] of tokens with the kernel w_<name>.

    The kernel is [*inputs, *outputs]. The bias b_<name> is added if the options
    say so.

    Args:
      x: The tokens that are projected, [B, S, *inputs].
      name: The name of the projection, such as 'query' or 'out'.
      axes: The logical axes of the kernel, one for each dimension.
      outputs: The sizes of a token's result.
      **init: Options of `parameters.kernel`, such as `residual` or `shrink`.
    """
    B, S, *inputs = x.shape
    w = self._kernel(name, axes, inputs, outputs, **init)
    y = rows_matmul(x.reshape(B * S, -1), w).reshape(B, S, *outputs)
    if not self.options.has_bias(name, self.shared.use_bias):
      return y
    bias = parameters.bias(axes[len(inputs) :], role=_ROLE)
    b = self.param(f'b_{name}', bias, outputs, self.shared.param_dtype)
    return y + b.astype(self.shared.dtype)[None, None]

  def _kernel(self, name, axes, inputs, outputs, **init):
    """The parameter w_<name>, [*inputs, *outputs], reshaped to a matrix.

    The matrix has a row for each number of an input and a column for each
    number of an output. `axes` names the dimensions of the parameter, and
    `init` has options of `parameters.kernel`.
    """
    n, shape = len(inputs), (*inputs, *outputs)
    ins, outs = tuple(range(n)), tuple(range(n, len(shape)))
    kernel = parameters.kernel(
      self.shared, axes, role=_ROLE, in_axis=ins, out_axis=outs, **init
    )
    w = self.param(f'w_{name}', kernel, shape, self.shared.param_dtype)
    return w.reshape(math.prod(inputs), math.prod(outputs))

  def _sinks(self):
    if not self.options.sinks:
      return None
    init = parameters.bias(('heads',), role=_ROLE)
    return self.param('sinks', init, (self.options.num_heads,), jnp.float32)


def _only_real(x: X, segment_ids: Array | None) -> X | Array:
  """x [B, T, M] with zeros for NaN and infinities at padding, of segment 0.

  They would reach the gradients of kernels. x is returned as it is if x or
  `segment_ids` [B, T] is None.
  """
  if x is None or segment_ids is None:
    return x
  return without_nan(segment_ids > 0, x)


@dataclasses.dataclass(frozen=True)
class AttentionOptions(AttentionBase):
  """The options of multi-head and grouped-query attention."""

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
    """Yields a text if `num_kv_heads` does not divide `num_heads`.

    Unknown names in `biases` and an unused `fixed_scale` are problems, too.
    """
    yield from super().problems()
    if self.num_kv_heads and self.num_heads % self.num_kv_heads:
      N, H = self.num_kv_heads, self.num_heads
      yield f'num_kv_heads={N} does not divide num_heads={H}'
    if self.scale != 'fixed':
      yield from self.in_vain("unless scale is 'fixed'", 'fixed_scale')

  @property
  def module(self) -> type[nn.Module]:
    return Attention

  def within(self, width: int) -> Self:
    """The options with a head's width and the number of key heads filled in.

    Raises:
      OptionError: head_width is 0, and num_heads does not divide M = `width`.
    """
    H = self.num_heads
    if not self.head_width and width % H:
      problem = f'num_heads={H} does not divide width={width}; set head_width'
      raise OptionError([problem])
    return dataclasses.replace(
      self,
      num_kv_heads=self.num_kv_heads or H,
      head_width=self.head_width or width // H,
    )

  def for_encoder(self) -> Self:
    """A decoder's options without the window and with a key head for each head.

    Heads share keys only to make a decoder's cache smaller.
    """
    return dataclasses.replace(super().for_encoder(), num_kv_heads=0)

  @property
  def score_scale(self) -> float:
    return 0.0 if self.scale == 'head_width' else self.fixed_scale

  @property
  def head_widths(self) -> tuple[int, int]:
    return self.head_width, self.head_width

  @property
  def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
    shape = self.num_kv_heads, self.head_width
    return shape, shape

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

  def finished(
    self, x: Float[Array, '*B N D'], scale: Float[Array, '*n'] | None
  ) -> Float[Array, '*B N D']:
    """Queries, keys or values x, normalised if they have a scale, then clipped.

    The norm is over as many of the last dimensions as the scale has; None: no
    norm. Values are clipped to [-clip, clip], where the option `clip` is not 0.
    """
    if scale is not None:
      x = rms_normed(x, scale, self.qk_norm_epsilon)
    return jnp.clip(x, -self.clip, self.clip) if self.clip else x


def project_memory(
  shared: Shared,
  options: AttentionOptions,
  p: Mapping[str, Any],
  memory: Float[Array, 'B S M'],
) -> tuple[Float[Array, 'B N S D'], Float[Array, 'B N S D']]:
  """The keys and values, of N heads, of a cross-attention layer, for a cache.

  Args:
    shared: The settings that all layers of the model share.
    options: The options of attention, with no size left at 0.
    p: The parameters of the layer's attention by name: w_key, w_value, and
      those of b_key, b_value and key_norm that it has.
    memory: The encoder's output.
  """

  def project(name):
    w = p[f'w_{name}'].astype(shared.dtype)
    y = jnp.einsum('BSM,MND->NDBS', memory.astype(shared.dtype), w)
    y = y.transpose(2, 3, 0, 1)  # [B, S, N, D]
    if (b := p.get(f'b_{name}')) is not None:
      y = y + b.astype(shared.dtype)[None, None]
    return options.finished(y, p.get(f'{name}_norm')).swapaxes(1, 2)

  return project('key'), project('value')
