"""The options of a stack of Transformer blocks."""

import dataclasses
from collections.abc import Iterator
from typing import Self

from moe_jax.errors import InputError
from moe_jax.layers.attention import ATTENTIONS, AttentionBase
from moe_jax.layers.norms import NORMS, Norm
from moe_jax.models.pattern import (
  count_sparse,
  shrunk_pattern,
  sparse_pattern,
)
from moe_jax.models.stack import REMATS, LayerKind, kinds_of
from moe_jax.models.text_options import LayerOptions
from moe_jax.options import above, choice, one_of, option


@dataclasses.dataclass(frozen=True)
class StackOptions(LayerOptions):
  """The options of a stack of Transformer blocks."""

  attention: AttentionBase = choice(
    ATTENTIONS, 'heads', 'Kind of attention in every block of a Transformer.'
  )
  norm: Norm = choice(
    NORMS,
    'rmsnorm',
    'Normalisation before every attention and feed-forward, and at the end.',
  )
  residual_multiplier: float = option(
    1.0,
    'Number that the output of each attention and feed-forward is multiplied '
    'by before it joins the residual stream (Granite 3.0).',
    above(0),
  )
  scan_layers: bool = option(
    True,
    'Whether equal layers are compiled as one loop, so that compile time does '
    'not grow with their number. Results are the same.',
    how=True,
  )
  remat: str = option(
    'none',
    "Values that the backward pass recomputes to save memory: 'none'; 'full': "
    "all but the inputs of layers and the routers' decisions; 'dots': all but "
    'those and the products with kernels. Unrolled layers save no memory on a '
    'CPU.',
    one_of(*REMATS),
    how=True,
  )

  @property
  def full(self) -> tuple[bool, ...]:
    """A flag for each layer: whether its tokens see all up to themselves."""
    if not self.attention.window:
      return (True,) * self.num_layers
    return sparse_pattern(
      self.attention.full_layers, self.num_layers, 'attention.full_layers'
    )

  @property
  def windows(self) -> tuple[int, ...]:
    """The window of each layer's attention; 0 for none."""
    window = self.attention.window
    return tuple(0 if flag else window for flag in self.full)

  @property
  def kinds(self) -> tuple[LayerKind, ...]:
    """The kind of each layer; see `stack.LayerKind`."""
    return kinds_of(self.moe, self.sparse, self.windows)

  def problems(self) -> Iterator[str]:
    """The problem of full layers that are not among the layers."""
    yield from super().problems()
    attention = self.attention
    if not attention.window:
      return
    try:
      # This makes no list, which of billions of layers would take minutes.
      count_sparse(
        attention.full_layers, self.num_layers, 'attention.full_layers'
      )
    except InputError as error:
      yield str(error)

  def shrunk(self) -> Self:
    """See `Options.shrunk`."""
    small = super().shrunk()
    full, number = shrunk_pattern(self.attention.full_layers, self.num_layers)
    return dataclasses.replace(
      small,
      num_layers=max(small.num_layers, number),
      attention=dataclasses.replace(small.attention, full_layers=full),
    )
