"""The contract of the kinds of attention, and the options that all have."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import Options, option
from moe_jax.layers.attention.dot_product import IMPLEMENTATIONS
from moe_jax.layers.attention.keys import Keys
from moe_jax.shapes import Array, Float


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
    ROTATED: The name of the option of the width that positions rotate.
    crosses: Whether a decoder's layers can attend to an encoder by this kind.
  """

  PROJECTIONS: ClassVar[tuple[str, ...]] = ()
  ROTATED: ClassVar[str] = 'head_width'
  crosses: ClassVar[bool] = True

  num_heads: int = option(
    4,
    'Number H of attention heads.',
    minimum=1,
  )
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
    choices=IMPLEMENTATIONS,
    same_function=True,
  )

  def problems(self) -> Iterator[str]:
    """The problem of a bias for a projection that does not exist."""
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
    """Whether a projection adds a bias.

    Args:
      projection: The name of a projection.
      use_bias: Whether the layers of the model usually do.
    """
    if projection not in self.PROJECTIONS:
      return False
    if self.biases == 'model':
      return use_bias
    return self.biases == 'all' or projection in self._bias_names

  @property
  def module(self) -> type[nn.Module]:
    """The class of the module, which takes these options."""
    raise NotImplementedError

  def norm_shape(self, name: str, heads: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scale of a norm; () where there is no norm.

    Args:
      name: 'query', 'key' or 'value'.
      heads: The number of heads, and their width.
    """
    del name, heads
    return ()

  def finished(
    self, x: Float[Array, '*B N D'], scale: Float[Array, '*n'] | None
  ) -> Float[Array, '*B N D']:
    """Queries, keys or values with norms and clipping; by default, with none.

    Args:
      x: The output of a projection.
      scale: The scale of the norm over as many of the last dimensions as it
        has; None: there is no norm.
    """
    del scale
    return x

  def within(self, width: int) -> Self:
    """These options in a model of that width, with no size left at 0."""
    del width
    return self

  def for_encoder(self) -> Self:
    """The options of an encoder's layers, where these are a decoder's."""
    return dataclasses.replace(self, window=0, full_layers='none')

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


def rms_normed(
  x: Float[Array, '*B'], scale: Float[Array, '*n'], epsilon: float
) -> Float[Array, '*B']:
  """x over its root mean square times `scale`; statistics are float32.

  The mean is over as many of the last dimensions as the scale has, on all
  devices that they are split over.
  """
  axes = tuple(range(-scale.ndim, 0))
  x32 = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
  scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
  return (x32 * jax.lax.rsqrt(mean + epsilon) * scale).astype(x.dtype)
