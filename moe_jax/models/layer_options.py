"""The options of the layers of a model, or of its encoder or decoder."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

from moe_jax.config import Options, choice, fields_of, option
from moe_jax.errors import InputError
from moe_jax.layers.attention import ATTENTIONS, AttentionBase
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.norms import NORMS, Norm
from moe_jax.layers.routers import ROUTERS
from moe_jax.models.pattern import (
  shrunk_pattern,
  sparse_numbers,
  sparse_pattern,
)
from moe_jax.models.stack import kept_names


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
class LayerOptions(Options):
  """The options of the layers of a model, or of its encoder or decoder."""

  num_layers: int = option(
    4,
    'Number of layers of the model; in an encoder-decoder, of the decoder.',
    minimum=1,
  )
  dropout: float = option(
    0.0,
    'Rate of dropout in training, on embedded tokens, outputs of layers, '
    'hidden values and attention weights; 0.0 drops nothing.',
    minimum=0,
    below=1,
    same_function=True,
  )
  ffn: FfnOptions = option(FfnOptions(), 'Dense feed-forward layers.')
  moe: MoeOptions = option(
    MoeOptions(), 'Sparse layers, which are mixtures of experts.'
  )

  @property
  def sparse(self) -> tuple[bool, ...]:
    """A flag for each layer: whether it is a sparse layer."""
    return sparse_pattern(self.moe.layers, self.num_layers)

  @property
  def num_sparse(self) -> int:
    """The number of sparse layers, counted without making a list of them."""
    return len(sparse_numbers(self.moe.layers, self.num_layers))

  def feed_forward_parameters(
    self, width: int, dense: int | None = None
  ) -> int:
    """A lower bound on the number of values in kernels of feed-forwards.

    Args:
      width: The width M of the model.
      dense: The number of layers with a dense feed-forward; None: all that are
        not sparse.
    """
    moe, sparse = self.moe.within(self.ffn, self.dropout), self.num_sparse
    dense = self.num_layers - sparse if dense is None else dense
    try:
      ffn, num_experts = moe.expert.twin(1).ffn, moe.num_experts
      ffn = ffn if num_experts else moe.twin().ffn
    except InputError:  # experts without a known width
      ffn, num_experts = FfnOptions(1), moe.num_experts
    total = dense * self.ffn.kernel_values(width)
    if num_experts and (shared := moe.shared_twin) is not None:
      total += sparse * shared.ffn.kernel_values(width)
    return total + sparse * max(num_experts, 1) * ffn.kernel_values(width)

  @property
  def has_experts(self) -> bool:
    """Whether some layer has experts, rather than their dense twin.

    It is False where `problems` reports a wrong `moe.layers`.
    """
    try:
      return self.num_sparse > 0 and self.moe.num_experts > 0
    except InputError:
      return False

  @property
  def routes_by_task(self) -> bool:
    """Whether some router needs the tasks of tokens."""
    return self.has_experts and 'task_ids' in self.moe.router.reads

  def problems(self) -> Iterator[str]:
    """Yields a text if `moe.layers` or `moe.retained` names wrong layers."""
    yield from super().problems()
    try:
      sparse = sparse_numbers(self.moe.layers, self.num_layers)
    except InputError as error:
      yield str(error)
      return
    retained = self.moe.retained.layers
    if invalid := sorted(i for i in retained if i not in sparse):
      yield (
        f'moe.retained names layers {invalid}, which are not among the sparse '
        f'layers {sorted(sparse)}'
      )

  def leak(self) -> Iterator[str]:
    """Yields a text if routing leaks later tokens and no option permits it."""
    reason = self.moe.leak() if self.has_experts else None
    if reason is None:
      return
    if self.moe.router.mixes:
      yield (
        f'moe.{reason}; it is for encoders alone, in model.encoder.overrides'
      )
    elif not self.moe.allow_future_leak:
      yield (
        f'moe: {reason}, or set moe.allow_future_leak=True and report the run '
        'as one that leaks'
      )

  def group_problems(
    self, run: RunShape, name: str, length: int
  ) -> Iterator[str]:
    """Yields texts on groups of tokens that do not fit the batches of a run.

    Args:
      run: The sizes of the run.
      name: The name, for messages, of the option that sets `length`.
      length: The length of rows in tokens.
    """
    S, rows = self.moe.group_size, run.rows
    # A run whose targets have no length is refused for that reason elsewhere.
    if not (self.moe.num_experts and length):
      return
    if S > 0 and S % length and 'segment_ids' in self.moe.router.reads:
      yield (
        f'model.moe.group_size={S} ends groups within rows of {name}={length}, '
        'and the router needs whole sentences; use 0, -1 or a multiple of the '
        'length'
      )
    if S == -1 and run.microbatches > 1:
      yield (
        f'model.moe.group_size={S} with microbatches={run.microbatches}: the '
        'group is the whole batch, of which a microbatch is a part; set the '
        'size in tokens, or microbatches=1'
      )
    elif S > 0 and rows * length % S:
      yield (
        f'model.moe.group_size={S} does not divide the {rows * length} tokens '
        f'of a microbatch ({rows} rows of {name}={length}): a group never '
        'spans two'
      )
    groups = 1 if S == -1 else rows * length // (S or length)
    if groups % run.parts:
      more_rows = '' if S == -1 else 'more rows in a microbatch or '
      yield (
        f'model.moe.group_size={S}: the {groups} groups of {S or length} '
        f'tokens in a microbatch ({rows} rows of {name}={length}) do not '
        f'divide by the {run.parts} devices that rows are split over: a group '
        f'never spans two; {more_rows}a smaller group_size makes more groups, '
        'and devices along mesh.tensor share their rows'
      )
    if self.moe.router.mixes:  # the tokens of a group, of several examples too
      kind = ROUTERS.name_of(self.moe.router)
      if length < S or (S == -1 and rows > 1):
        yield (
          f'model.moe.group_size={S} has several rows of {name}={length} in a '
          f'group, and router.kind={kind!r} would mix them; use 0 or a divisor '
          'of the length'
        )
      if run.packed:
        yield (
          'data.pack=True: short examples share a row, and router.kind='
          f'{kind!r} would mix them; use pack=False'
        )
    sizes = dataclasses.replace(
      self.moe.sizes, rows=rows, groups=groups, microbatches=run.microbatches
    )
    for problem in self.moe.router.problems_with(sizes):
      yield f'model.moe.{problem}'

  def shrunk(self) -> Self:
    small = super().shrunk()
    layers, number = shrunk_pattern(self.moe.layers, self.num_layers)
    return dataclasses.replace(
      small,
      num_layers=number,
      moe=dataclasses.replace(small.moe, layers=layers),
    )


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
    "those and the products with kernels; 'save=' and names, as in "
    "'save=rows,hidden': all but those and the 'rows' that experts multiply, "
    "the 'hidden' products before activations, the outputs of 'attention', or "
    "all 'products'. Unrolled layers save no memory on a CPU.",
    same_function=True,
  )

  @property
  def stack_values(self) -> dict[str, Any]:
    """The values of the options of `StackOptions`, by name.

    Subclasses, options of whole models, make a stack's own options of them.
    """
    return {name: getattr(self, name) for name in fields_of(StackOptions)}

  @property
  def full(self) -> tuple[bool, ...]:
    """A flag for each layer: whether its attention has no window."""
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

  def problems(self) -> Iterator[str]:
    yield from super().problems()
    try:
      kept_names(self.remat)
    except InputError as error:
      yield str(error)
    layers, option_name = self.attention.full_layers, 'attention.full_layers'
    if not self.attention.window:
      return
    try:
      # The layers are counted without a list: billions would take minutes.
      sparse_numbers(layers, self.num_layers, option_name)
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
