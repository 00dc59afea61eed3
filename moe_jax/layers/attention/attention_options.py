"""The options of attention, which are the same in every layer of a model.

`AttentionBase` is what kinds of attention share; `AttentionOptions` are those
of heads with keys and values. Not here: latent attention (`latent.py`).
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self

from moe_jax.layers.attention.dot_product import IMPLEMENTATIONS
from moe_jax.layers.attention.keys import Keys
from moe_jax.options import (
  NOT_EMPTY,
  OptionError,
  Options,
  above,
  at_least,
  one_of,
  option,
)


class HeadWidths(NamedTuple):
  """The numbers that each head of attention has for a token.

  Attributes:
    scored: Numbers of a query and of a key, whose product is a score.
    value: Numbers of a value.
  """

  scored: int
  value: int


@dataclasses.dataclass(frozen=True)
class AttentionBase(Options):
  """The contract of the kinds of attention.

  Attributes:
    PROJECTIONS: The projections that may add a bias.
    crosses: Whether a decoder's layers can attend to an encoder so.
  """

  PROJECTIONS: ClassVar[tuple[str, ...]] = ()
  crosses: ClassVar[bool] = True

  num_heads: int = option(4, 'Number H of attention heads.', at_least(1))
  _: dataclasses.KW_ONLY
  window: int = option(
    0,
    'Number of tokens that a token of a causal stack attends to, itself '
    'included (Mistral, arXiv:2310.06825); 0: all up to itself. An encoder has '
    'no window.',
    at_least(0),
  )
  biases: str = option(
    'model',
    "Projections that add a bias: 'model' (all or none, by model.use_bias), "
    "'all', 'none', or names of projections with commas between, such as "
    "'query, key, value' (Qwen2; arXiv:2407.10671).",
    NOT_EMPTY,
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
    one_of(*IMPLEMENTATIONS),
    how=True,
  )

  def problems(self) -> Iterator[str]:
    """The problem of biases of projections that there are none of."""
    known = ['model', 'all', 'none'], self.PROJECTIONS
    if self.biases not in known[0] and not self._biased <= {*known[1]}:
      yield (
        f'biases={self.biases!r} must be one of {known[0]}, or names of '
        f'{[*known[1]]} with commas between'
      )

  @property
  def _biased(self) -> set[str]:
    return {name.strip() for name in self.biases.split(',')}

  def has_bias(self, projection: str, use_bias: bool) -> bool:
    """Whether a projection adds a bias.

    Args:
      projection: The name of a projection.
      use_bias: Whether the layers of the model usually do.
    """
    if projection not in self.PROJECTIONS:
      return False
    if self.biases == 'model':
      return use_bias
    return self.biases == 'all' or projection in self._biased

  def within(self, width: int) -> Self:
    """These options in a model of that width, with no size left at 0."""
    del width
    return self

  def for_encoder(self) -> Self:
    """The options of an encoder's layers, where these are a decoder's."""
    return dataclasses.replace(self, window=0)

  @property
  def head_widths(self) -> HeadWidths:
    """The widths of a head, after `within`."""
    raise NotImplementedError

  @property
  def score_scale(self) -> float:
    """The factor of scores; 0.0: one over the root of the width of a key."""
    return 0.0

  def keys(self, *, causal: bool, cross: bool = False) -> Keys:
    """The rules for the keys that a token sees.

    Args:
      causal: Whether the layer is causal; only then it has the window.
      cross: Whether the keys are those of another sequence.
    """
    window = self.window if causal else 0
    return Keys(causal, window, self.score_scale, cross)

  @property
  def rotated_width(self) -> int:
    """The width of the part of queries and keys that has positions."""
    raise NotImplementedError

  @property
  def cached_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """The heads and widths of a token's keys and values in the cache."""
    raise NotImplementedError

  @property
  def cached_values(self) -> int:
    """The number of values that a cache has of a token in a layer."""
    return sum(heads * width for heads, width in self.cached_shapes)

  @property
  def uncompressed_values(self) -> int:
    """`cached_values` if the cache kept keys and values of all heads."""
    return self.cached_values

  @property
  def decoding_products(self) -> int:
    """Multiply-adds of a generated token with each token of the cache."""
    return self.scoring_products

  @property
  def scoring_products(self) -> int:
    """Multiply-adds of a token with each other in the scores and the sums."""
    return self.num_heads * sum(self.head_widths)

  @property
  def projected_values(self) -> int:
    """Values of a token that the backward pass needs of queries and keys."""
    raise NotImplementedError

  def kernel_values(self, width: int) -> int:
    """The number of values of the kernels in a model of that width M."""
    raise NotImplementedError


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
    'as in T5, whose query kernels start smaller instead.',
    one_of('head_width', 'none'),
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
    return 0.0 if self.scale == 'head_width' else 1.0

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
    """The shape of the scale of a norm; () where there is no norm.

    Args:
      name: 'query', 'key' or 'value'.
      heads: The number of heads, and their width.
    """
    if name == 'value' or self.qk_norm == 'none':
      return ()
    return tuple(heads) if self.qk_norm == 'all' else (heads[-1],)
