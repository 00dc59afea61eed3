"""The options of attention, which are the same in every layer of a model."""

import dataclasses
from collections.abc import Iterator
from typing import Self

from moe_jax.layers.attention.dot_product import IMPLEMENTATIONS
from moe_jax.layers.attention.keys import Keys
from moe_jax.options import (
  Check,
  OptionError,
  Options,
  above,
  at_least,
  one_of,
  option,
)

# The projections of attention, which may each add a bias.
PROJECTIONS = ('query', 'key', 'value', 'out')


def _names_of(biases: str) -> tuple[str, ...]:
  return tuple(name.strip() for name in biases.split(','))


def _are_biases(biases: str) -> bool:
  names = _names_of(biases)
  return biases in ('model', 'all', 'none') or set(names) <= set(PROJECTIONS)


@dataclasses.dataclass(frozen=True)
class AttentionOptions(Options):
  """The options of attention, which are the same in every layer of a model."""

  num_heads: int = option(4, 'Number H of attention heads.', at_least(1))
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
  window: int = option(
    0,
    'Number of tokens that a token of a causal stack attends to, itself '
    'included (Mistral, arXiv:2310.06825); 0: all up to itself. An encoder has '
    'no window.',
    at_least(0),
  )
  scale: str = option(
    'head_width',
    "Factor of attention scores: 'head_width' is head_width^-0.5; 'none' is 1, "
    'as in T5, whose query kernels start smaller instead.',
    one_of('head_width', 'none'),
  )
  biases: str = option(
    'model',
    "Projections that add a bias: 'model' (all or none, by model.use_bias), "
    "'all', 'none', or names of projections with commas between, such as "
    "'query, key, value' (Qwen2; arXiv:2407.10671).",
    Check(
      f"must be 'model', 'all', 'none' or names of {list(PROJECTIONS)} with "
      'commas between',
      _are_biases,
    ),
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
    """The problem of query heads that key heads do not share evenly."""
    if self.num_kv_heads and self.num_heads % self.num_kv_heads:
      yield (
        f'num_kv_heads={self.num_kv_heads} does not divide '
        f'num_heads={self.num_heads}'
      )

  def within(self, width: int) -> 'AttentionOptions':
    """These options in a model of that width, with no size left at 0.

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

  def kernel_values(self, width: int) -> int:
    """The number of values of the kernels in a model of that width M."""
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

  def has_bias(self, projection: str, use_bias: bool) -> bool:
    """Whether a projection adds a bias.

    Args:
      projection: One of `PROJECTIONS`.
      use_bias: Whether the layers of the model usually do.
    """
    if self.biases == 'model':
      return use_bias
    return self.biases == 'all' or projection in _names_of(self.biases)

  def norm_shape(self, name: str, heads: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scale of a norm; () where there is no norm.

    Args:
      name: 'query', 'key' or 'value'.
      heads: The number of heads, and their width.
    """
    if name == 'value' or self.qk_norm == 'none':
      return ()
    return tuple(heads) if self.qk_norm == 'all' else (heads[-1],)

  def keys(self, *, causal: bool, cross: bool = False) -> Keys:
    """The rules for the keys that a token sees.

    Args:
      causal: Whether the layer is causal; only then it has the window.
      cross: Whether the keys are those of another sequence.
    """
    return Keys(
      causal=causal,
      window=self.window if causal else 0,
      scale=0.0 if self.scale == 'head_width' else 1.0,
      cross=cross,
    )
