"""The contract of a model's options, which those of all kinds keep.

They say what a model is, and build it. Not here: the module (`base.py`), and
which kinds there are (`kinds.py`).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Self

from moe_jax.layers.shared import RULES
from moe_jax.models.base import Model
from moe_jax.options import Options, at_least, option
from moe_jax.partitioning import Rules
from moe_jax.sections import ConfigDict


class RunShape(NamedTuple):
  """The sizes of a run that decide whether a model can be trained in it.

  Attributes:
    total_steps: Optimizer steps of the run.
    rows: Sequences of a microbatch.
    microbatches: Microbatches of an optimizer step.
    seq_len: Tokens of a row; of an encoder-decoder, of the encoder's.
    target_len: Tokens of a decoder's row, in an encoder-decoder.
    parts: Devices that the rows are split over; 1 where they are not known.
  """

  total_steps: int
  rows: int
  microbatches: int
  seq_len: int
  target_len: int = 0
  parts: int = 1


@dataclasses.dataclass(frozen=True)
class ModelOptions(Options):
  """The contract of a model's options.

  Attributes:
    reads_features: Whether inputs are examples of numbers with a class each,
      and no text.
    has_encoder: Whether it reads two sequences: inputs and targets.
    has_blocks: Whether its layers are blocks of attention and feed-forward.
  """

  reads_features: ClassVar[bool] = False
  has_encoder: ClassVar[bool] = False
  has_blocks: ClassVar[bool] = False

  vocab_size: int = option(
    0,
    'Number of tokens, or of classes, that the model tells apart; 0: the '
    "data's own number.",
    at_least(0),
  )

  def filled(
    self, vocab_size: int, feature_shape: tuple[int, ...], seq_len: int
  ) -> Self:
    """The options with what the data decides in the place of zeros.

    Args:
      vocab_size: The number of tokens or classes in the data.
      feature_shape: The shape of an example that is no text; () for text.
      seq_len: The length of the longest rows in tokens.

    Raises:
      ValueError: The model tells fewer tokens apart than the data has, or its
        examples are of another shape.
    """
    del feature_shape, seq_len
    if 0 < self.vocab_size < vocab_size:
      raise ValueError(
        f'model.vocab_size={self.vocab_size} is smaller than the '
        f"tokenizer's {vocab_size}"
      )
    size = self.vocab_size or vocab_size
    return dataclasses.replace(self, vocab_size=size)

  def build(self, rules: Rules = RULES) -> Model:
    """The linen module.

    Args:
      rules: The mesh axes of each logical axis; see `partitioning.make_rules`.

    Raises:
      ValueError: The vocabulary, or another size that the data decides, is
        still 0.
    """
    raise NotImplementedError

  def problems_in(self, run: RunShape) -> Iterator[str]:
    """The reasons why the model cannot be trained in a run of these sizes."""
    del run
    return iter(())

  def shrunk(self) -> Self:
    """The same structure at a laptop's size, on the data's own vocabulary."""
    return dataclasses.replace(super().shrunk(), vocab_size=0)

  @classmethod
  def settle_overrides(
    cls, before: ConfigDict, after: ConfigDict
  ) -> dict[str, Any]:
    """Takes what a later layer switched off out of overrides in the section.

    Args:
      before: The model's section as the earlier layers of the config left it.
      after: With the later layer; its overrides are changed in place.

    Returns:
      The overrides that were given up, by name.
    """
    del before, after
    return {}

  def check_filled(self) -> None:
    """Raises ValueError where a size is 0 that the data decides."""
    if not self.vocab_size:
      raise ValueError(
        f"model.vocab_size={self.vocab_size}: 0 stands for the tokenizer's; "
        'set it, or load the data first'
      )
