"""The contract of a model's options, which describe a model and build it."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Self

from moe_jax.errors import InputError
from moe_jax.layers.shared import RULES
from moe_jax.models.base import Model
from moe_jax.options import Options, at_least, option, required
from moe_jax.partitioning import Rules
from moe_jax.sections import ConfigDict


class RunShape(NamedTuple):
  """The sizes of a run that decide whether a model can be trained in it.

  Attributes:
    total_steps: The number of optimizer steps of the run.
    rows: The number of sequences of a microbatch.
    microbatches: The number of microbatches of an optimizer step.
    seq_len: The length of a row in tokens; in an encoder-decoder, of an
      encoder's row.
    target_len: The length of a decoder's row in an encoder-decoder.
    parts: The number of devices over which rows are split; 1 if not known.
    packed: Whether short examples may share a row.
  """

  total_steps: int
  rows: int
  microbatches: int
  seq_len: int
  target_len: int = 0
  parts: int = 1
  packed: bool = False


@dataclasses.dataclass(frozen=True)
class ModelOptions(Options):
  """The contract of a model's options.

  Attributes:
    has_encoder: Whether the model reads two sequences, inputs and targets.
    has_blocks: Whether layers are blocks of attention and feed-forward.
  """

  has_encoder: ClassVar[bool] = False
  has_blocks: ClassVar[bool] = False

  vocab_size: int = option(
    0,
    'Number of tokens that the model tells apart; 0: that of the data.',
    at_least(0),
  )

  def filled(
    self,
    vocab_size: int,
    seq_len: int,
    num_tasks: int = 0,
  ) -> Self:
    """The options with sizes that the data decides in place of zeros.

    Args:
      vocab_size: The number of tokens in the data.
      seq_len: The length of the longest rows in tokens.
      num_tasks: The number of tasks in the data; 0 where it has none.

    Raises:
      ValueError: The model tells fewer tokens or tasks apart than the data has.
    """
    del seq_len, num_tasks
    if 0 < self.vocab_size < vocab_size:
      raise InputError(
        f'model.vocab_size={self.vocab_size} is smaller than the '
        f"tokenizer's {vocab_size}; choose the tokenizer that the model was "
        "trained with: data.tokenizer.kind='file' and its file.path"
      )
    size = self.vocab_size or vocab_size
    return dataclasses.replace(self, vocab_size=size)

  @property
  def routes_by_task(self) -> bool:
    """Whether some router needs the tasks of tokens."""
    return False

  @property
  def replay(self) -> str:
    """Folder of the trace whose choices are replayed; '' for none."""
    return ''

  @property
  def param_dtype(self) -> str:
    """The type in which parameters are stored."""
    return 'float32'

  def least_parameters(self) -> int:
    """The least number of parameters' values, by arithmetic on the options.

    It takes no time however many there are. A kind counts what may be large.
    """
    return 0

  @required
  def build(self, rules: Rules = RULES) -> Model:
    """The linen module of the model.

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
    """Drops overrides in the section that a later layer leaves without effect.

    Args:
      before: The model's section as the earlier layers of the config left it.
      after: The section with the later layer; its overrides change in place.

    Returns:
      The overrides that were dropped, by name.
    """
    del before, after
    return {}

  def check_filled(self) -> None:
    """Raises ValueError where a size that the data decides is still 0."""
    if not self.vocab_size:
      raise InputError(
        f"model.vocab_size={self.vocab_size}: 0 stands for the tokenizer's; "
        'set it, or load the data first'
      )
