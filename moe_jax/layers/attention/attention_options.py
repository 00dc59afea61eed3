"""The options of attention, which are the same in every layer of a model."""

import dataclasses
from collections.abc import Iterator
from typing import Self

from moe_jax.layers.attention.dot_product import IMPLEMENTATIONS
from moe_jax.layers.attention.keys import Keys
from moe_jax.options import OptionError, Options, at_least, one_of, option


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
