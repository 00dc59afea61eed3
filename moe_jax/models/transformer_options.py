"""The options of Transformers and of their stacks of blocks."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Self

from moe_jax.config import OptionError, choice, no_effect, option
from moe_jax.errors import InputError
from moe_jax.layers.attention import ATTENTIONS, AttentionBase
from moe_jax.layers.block import BlockConfig
from moe_jax.layers.norms import NORMS, Norm
from moe_jax.models.pattern import (
  count_sparse,
  shrunk_pattern,
  sparse_pattern,
)
from moe_jax.models.stack import (
  REMATS,
  LayerKind,
  Padding,
  StackConfig,
  kinds_of,
)
from moe_jax.models.text_options import LayerOptions, TextModelOptions
from moe_jax.partitioning import Rules


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
    above=0,
  )
  scan_layers: bool = option(
    True,
    'Whether equal layers are compiled as one loop, so that compile time does '
    'not grow with their number. Results are the same.',
    same_function=True,
  )
  remat: str = option(
    'none',
    "Values that the backward pass recomputes to save memory: 'none'; 'full': "
    "all but the inputs of layers and the routers' decisions; 'dots': all but "
    'those and the products with kernels. Unrolled layers save no memory on a '
    'CPU.',
    choices=REMATS,
    same_function=True,
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
    small = super().shrunk()
    full, number = shrunk_pattern(self.attention.full_layers, self.num_layers)
    return dataclasses.replace(
      small,
      num_layers=max(small.num_layers, number),
      attention=dataclasses.replace(small.attention, full_layers=full),
    )


@dataclasses.dataclass(frozen=True)
class TransformerOptions(TextModelOptions, StackOptions):
  """The options of a model of text of blocks of attention and feed-forward."""

  has_blocks: ClassVar[bool] = True

  num_tasks: int = option(
    0,
    'Number of tasks that routers by task tell apart; 0: that of the data, '
    'whose tasks are the sources of data.mixture.',
    minimum=0,
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
    return any(
      half.has_experts and 'task_ids' in half.moe.router.reads
      for half in self.halves
    )

  def filled(self, vocab_size, seq_len, num_tasks=0):
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
    super().check_filled()
    if self.routes_by_task and not self.num_tasks:
      raise InputError(
        'model.num_tasks=0 with a router by task: the data has no tasks, which '
        'are the sources of data.mixture; name them there'
      )

  def shared(self, num_layers, rules):
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
