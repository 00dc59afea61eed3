"""The options of attention, as a model has it in every layer."""

import dataclasses
from collections.abc import Iterator

from moe_jax.layers.attention.dot_product import IMPLEMENTATIONS
from moe_jax.layers.attention.keys import Keys
from moe_jax.options import OptionError, Options, at_least, one_of, option


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
    one_of(*IMPLEMENTATIONS),
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

  def keys(self, *, causal: bool, cross: bool = False) -> Keys:
    """The keys that a token sees in a layer that is causal, or reads another.

    A window is that of causal attention.
    """
    return Keys(
      causal=causal,
      window=self.window if causal else 0,
      scale=0.0 if self.scale == 'head_width' else 1.0,
      cross=cross,
    )
