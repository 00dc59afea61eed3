"""The options of Transformers, and the stacks that they make.

Not here: what an encoder has otherwise (`encoder_decoder.py`).
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from moe_jax.layers.block import BlockConfig
from moe_jax.models.padding import Padding
from moe_jax.models.stack import StackConfig
from moe_jax.models.text_options import StackOptions, TextModelOptions
from moe_jax.options import OptionError
from moe_jax.partitioning import Rules


@dataclasses.dataclass(frozen=True)
class TransformerOptions(TextModelOptions, StackOptions):
  """A model of text that is made of blocks of attention and feed-forwards."""

  has_blocks: ClassVar[bool] = True

  @property
  def padding(self) -> Padding:
    """The view of blocks and routers on padding; a subclass may show it."""
    return Padding()

  def half_problems(self, half: StackOptions, causal: bool) -> Iterator[str]:
    """The problems of the layers of a half in a model of this width."""
    try:
      attention = half.attention.within(self.width)
    except OptionError as error:
      yield from error.below('attention.').problems
      return
    for problem in self.positions.problems_with(attention.head_width, causal):
      yield f'positions: {problem}'

  def problems(self) -> Iterator[str]:
    """Heads fit the width, and positions the heads."""
    yield from super().problems()
    yield from self.half_problems(self, causal=True)

  def stack_config(
    self,
    half: StackOptions,
    rules: Rules,
    *,
    causal: bool,
    cross: bool = False,
  ) -> StackConfig:
    """A stack of the layers of a half.

    Args:
      half: The options of its layers.
      rules: The mesh axes of each logical axis.
      causal: Whether a token sees those up to itself, or its whole segment.
      cross: Whether the blocks attend to an encoder's output.
    """
    sparse = half.sparse
    return StackConfig(
      sparse=sparse,
      block=BlockConfig(
        attention=half.attention.within(self.width),
        ffn=half.ffn,
        moe=half.moe.within(half.ffn, half.dropout) if any(sparse) else None,
        norm=half.norm,
        positions=self.positions,
        causal=causal,
        cross=cross,
        dropout=half.dropout,
        shared=self.shared(half.num_layers, rules),
      ),
      padding=self.padding,
      scan_layers=half.scan_layers,
      remat=half.remat,
    )
