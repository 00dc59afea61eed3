"""Padding, as the blocks of a stack and their routers see it.

The models here hide padding from everything. Another library's models may not:
a subclass of `Padding` says what they see (`moe_jax.interop.quirks`).
"""

import dataclasses

from moe_jax.layers.block import Context
from moe_jax.shapes import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Padding:
  """Padding takes no slot, counts as no token and is attended to by none."""

  def context(self, context: Context) -> Context:
    """The context of the blocks, given the one that hides padding."""
    return context

  def routed(self, segment_ids: Int[Array, 'B T']) -> Bool[Array, 'B T']:
    """The tokens that routers count, as True; segment 0 is padding."""
    return segment_ids > 0
