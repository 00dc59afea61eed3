"""Whether the blocks of a stack and their routers see padding.

The models here hide padding from everything. For models of other libraries a
subclass of `Padding` may show it (`moe_jax.interop.quirks`).
"""

import dataclasses

from moe_jax.layers.block import Context
from moe_jax.shapes import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Padding:
  """Padding that takes no slot, is not counted and that no token attends to."""

  def context(self, context: Context) -> Context:
    """The context of the blocks, from the one that hides padding."""
    return context

  def routed(self, segment_ids: Int[Array, 'B T']) -> Bool[Array, 'B T']:
    """The tokens that routers count, as True; segment 0 is padding."""
    return segment_ids > 0
