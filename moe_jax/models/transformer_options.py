"""The options of Transformers, and the stacks that they make."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from moe_jax.errors import InputError
from moe_jax.layers.block import BlockConfig
from moe_jax.models.padding import Padding
from moe_jax.models.stack import StackConfig
from moe_jax.models.stack_options import StackOptions
from moe_jax.models.text_options import TextModelOptions
from moe_jax.options import OptionError, at_least, no_effect, option
from moe_jax.partitioning import Rules


@dataclasses.dataclass(frozen=True)
class TransformerOptions(TextModelOptions, StackOptions):
  """The options of a model of text of blocks of attention and feed-forward."""

  has_blocks: ClassVar[bool] = True

  num_tasks: int = option(
    0,
    'Number of tasks that routers by task tell apart; 0: that of the data, '
    'whose tasks are the sources of data.mixture.',
    at_least(0),
  )

  @property
  def padding(self) -> Padding:
    """The rule that hides padding; a subclass may return one that shows it."""
    return Padding()

  @property
  def halves(self) -> tuple[StackOptions, ...]:
    """The options of the layers of each stack, an encoder's first."""
    return (self,)

  @property
  def routes_by_task(self) -> bool:
    """See `ModelOptions.routes_by_task`."""
    return any(
      half.has_experts and half.moe.router.needs_tasks for half in self.halves
    )

  def filled(self, vocab_size, seq_len, num_tasks=0):
    """See `ModelOptions.filled`."""
    options = super().filled(vocab_size, seq_len, num_tasks)
    if not self.routes_by_task:
      return options
    if 0 < self.num_tasks < num_tasks:
      raise InputError(
        f'model.num_tasks={self.num_tasks} is smaller than the {num_tasks} '
        'tasks of the data'
      )
    size = self.num_tasks or num_tasks
    return dataclasses.replace(options, num_tasks=size)

  def check_filled(self) -> None:
    """See `ModelOptions.check_filled`."""
    super().check_filled()
    if self.routes_by_task and not self.num_tasks:
      raise InputError(
        'model.num_tasks=0 with a router by task: the data has no tasks, which '
        'are the sources of data.mixture; name them there'
      )

  def shared(self, num_layers, rules):
    """See `TextModelOptions.shared`."""
    shared = super().shared(num_layers, rules)
    return dataclasses.replace(shared, num_tasks=self.num_tasks)

  def half_problems(self, half: StackOptions, causal: bool) -> Iterator[str]:
    """The problems of the layers of an encoder or decoder of this width."""
    try:
      attention = half.attention.within(self.width)
    except OptionError as error:
      yield from error.below('attention.').problems
      return
    for problem in self.positions.problems_with(
      attention.rotated_width, causal, attention.ROTATED
    ):
      yield f'positions: {problem}'

  def problems(self) -> Iterator[str]:
    """The problems of heads and the width, and of positions and heads."""
    yield from super().problems()
    yield from self.half_problems(self, causal=True)

  def task_problems(self) -> Iterator[str]:
    """The problem of a number of tasks that no router needs."""
    if self.num_tasks and not self.routes_by_task:
      yield no_effect(
        'num_tasks', self.num_tasks, 'where no router goes by task'
      )

  def half_parameters(self, half: StackOptions, attentions: int = 1) -> int:
    """The least number of values of the layers of an encoder or decoder.

    Args:
      half: The options of its layers.
      attentions: The number of attentions in each layer.
    """
    attention = attentions * half.attention.kernel_values(self.width)
    layers = half.num_layers * attention
    return layers + half.feed_forward_parameters(self.width)

  def least_parameters(self) -> int:
    """See `ModelOptions.least_parameters`."""
    return super().least_parameters() + self.half_parameters(
      self, 1 + self.has_encoder
    )

  def stack_config(
    self,
    half: StackOptions,
    rules: Rules,
    *,
    causal: bool,
    cross: bool = False,
  ) -> StackConfig:
    """The configuration of the stack of an encoder or decoder.

    Args:
      half: The options of its layers.
      rules: The mesh axes of each logical axis.
      causal: Whether a token sees tokens up to itself, or its whole segment.
      cross: Whether the blocks attend to an encoder's output.
    """
    sparse, attention = half.sparse, half.attention.within(self.width)
    return StackConfig(
      sparse=sparse,
      block=BlockConfig(
        attention=dataclasses.replace(attention, full_layers='none'),
        ffn=half.ffn,
        moe=half.moe.within(half.ffn, half.dropout) if any(sparse) else None,
        norm=half.norm,
        positions=self.positions,
        causal=causal,
        cross=cross,
        dropout=half.dropout,
        residual_multiplier=half.residual_multiplier,
        shared=self.shared(half.num_layers, rules),
      ),
      padding=self.padding,
      scan_layers=half.scan_layers,
      remat=half.remat,
      windows=half.windows if causal else (0,) * half.num_layers,
    )
