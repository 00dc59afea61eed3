"""The options that all models of text have: those of layers and of tables."""

import dataclasses
from collections.abc import Iterator
from typing import Self

from moe_jax.config import Options, choice, option
from moe_jax.errors import InputError
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.kernel_format import KernelFormat
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.positions import POSITIONS, Positions
from moe_jax.layers.routers import ROUTERS
from moe_jax.layers.shared import Numerics, Shared
from moe_jax.models.base import ModelOptions, RunShape
from moe_jax.models.embeddings import EmbeddingConfig, EmbeddingOptions
from moe_jax.models.pattern import count_sparse, shrunk_pattern, sparse_pattern
from moe_jax.partitioning import Rules


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
    """A flag for each layer: whether it is one of the sparse ones."""
    return sparse_pattern(self.moe.layers, self.num_layers)

  @property
  def num_sparse(self) -> int:
    """The number of sparse layers, counted without a list of them."""
    return count_sparse(self.moe.layers, self.num_layers)

  def feed_forward_parameters(
    self, width: int, dense: int | None = None
  ) -> int:
    """The number of values of the kernels of feed-forwards, or fewer.

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

    No layer has, where `problems` names a wrong `moe.layers`.
    """
    try:
      return self.num_sparse > 0 and self.moe.num_experts > 0
    except InputError:
      return False

  def problems(self) -> Iterator[str]:
    """The problem of sparse layers that are not among the layers."""
    yield from super().problems()
    try:
      self.num_sparse  # noqa: B018
    except InputError as error:
      yield str(error)
      return
    retained = self.moe.retained.layers
    if not retained:
      return
    sparse = [i for i, flag in enumerate(self.sparse) if flag]
    if invalid := sorted(retained - set(sparse)):
      yield (
        f'moe.retained names layers {invalid}, which are not among the sparse '
        f'layers {sparse}'
      )

  def leak(self) -> Iterator[str]:
    """The problem of a router that leaks the future without permission."""
    moe = self.moe
    if self.has_experts and moe.router.mixes:
      yield (
        f'moe.{moe.leak()}; it is for encoders alone, in '
        'model.encoder.overrides'
      )
      return
    reason = moe.leak() if self.has_experts else None
    if reason is not None and not self.moe.allow_future_leak:
      yield (
        f'moe: {reason}, or set moe.allow_future_leak=True and report the run '
        'as one that leaks'
      )

  def group_problems(
    self, run: RunShape, name: str, length: int
  ) -> Iterator[str]:
    """The problems of groups that do not fit into the batches of a run.

    Args:
      run: The sizes of the run.
      name: The option for the length of rows: 'data.seq_len'.
      length: The length of rows in tokens.
    """
    S, rows = self.moe.group_size, run.rows
    # A run without a length of targets is refused for that.
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
    if self.moe.router.mixes:
      yield from self._mixture_problems(run, name, length)
    sizes = dataclasses.replace(
      self.moe.sizes, rows=rows, groups=groups, microbatches=run.microbatches
    )
    for problem in self.moe.router.problems_with(sizes):
      yield f'model.moe.{problem}'

  def _mixture_problems(self, run, name, length):
    """The problems of groups in which several examples would be mixed."""
    S, kind = self.moe.group_size, ROUTERS.name_of(self.moe.router)
    if length < S or (S == -1 and run.rows > 1):
      yield (
        f'model.moe.group_size={S} has several rows of {name}={length} in a '
        f'group, and router.kind={kind!r} would mix them; use 0 or a divisor '
        'of the length'
      )
    if run.packed:
      yield (
        f'data.pack=True: short examples share a row, and router.kind={kind!r} '
        'would mix them; use pack=False'
      )

  def shrunk(self) -> Self:
    small = super().shrunk()
    layers, number = shrunk_pattern(self.moe.layers, self.num_layers)
    return dataclasses.replace(
      small,
      num_layers=number,
      ffn=dataclasses.replace(small.ffn, hidden=48),
      moe=dataclasses.replace(small.moe, layers=layers),
    )


@dataclasses.dataclass(frozen=True)
class TextModelOptions(ModelOptions, LayerOptions):
  """The options of a model of text, from tokens to logits of the next one."""

  width: int = option(
    128,
    'Width M of the residual stream, in numbers for each token.',
    minimum=1,
  )
  use_bias: bool = option(
    False,
    'Whether products in attention and feed-forward layers add a bias, and '
    'layer norms have one.',
  )
  numerics: Numerics = option(
    Numerics(),
    "Types of the model's numbers, and initialisation of its parameters.",
    same_function=True,
  )
  embedding: EmbeddingOptions = option(
    EmbeddingOptions(), 'Embeddings of tokens, and the logits.'
  )
  positions: Positions = choice(
    POSITIONS, 'rotary', 'Kind of positions, which tell the order of tokens.'
  )

  def filled(
    self,
    vocab_size: int,
    seq_len: int,
    num_tasks: int = 0,
  ) -> Self:
    options = super().filled(vocab_size, seq_len, num_tasks)
    return dataclasses.replace(
      options, positions=options.positions.within(seq_len)
    )

  def problems_in(self, run: RunShape) -> Iterator[str]:
    yield from self.code_problems()
    yield from self.position_problems('data.seq_len', run.seq_len)
    yield from self.group_problems(run, 'data.seq_len', run.seq_len)

  @property
  def kernel_formats(self) -> dict[str, KernelFormat | None]:
    """The storage of experts in codes, by the options that say so."""
    return {'moe.expert.format': self.moe.expert.format}

  def code_problems(self) -> Iterator[str]:
    """The problem of training kernels that are stored in codes."""
    for name, format in self.kernel_formats.items():
      if format:
        yield (
          f'model.{name}.name={format.name!r}: kernels in codes of few bits '
          'are for evaluation and generation, and are not trained; train the '
          'run that they were made of'
        )

  def position_problems(self, name: str, length: int) -> Iterator[str]:
    """The problem of rows whose length, the option `name`, is too large."""
    if 0 < self.positions.table_len < length:
      yield (
        f'{name}={length} is more than the {self.positions.table_len} '
        'positions of model.positions'
      )

  def shared(self, num_layers: int, rules: Rules) -> Shared:
    """The settings that all layers of a stack of that depth share."""
    return Shared(self.numerics, self.use_bias, num_layers, rules)

  def embedding_config(self, rules: Rules) -> EmbeddingConfig:
    """The configuration of the tables of the model."""
    return EmbeddingConfig(
      self.embedding,
      self.shared(self.num_layers, rules),
      vocab_size=self.vocab_size,
      width=self.width,
      positions=self.positions,
      dropout=self.dropout,
    )

  @property
  def replay(self) -> str:
    return self.moe.replay

  @property
  def param_dtype(self) -> str:
    return self.numerics.param_dtype

  def least_parameters(self) -> int:
    """The tables alone are counted."""
    tables = 1 if self.embedding.tie else 2
    rows = tables * self.vocab_size + self.positions.table_len
    return rows * self.width

  def check_filled(self) -> None:
    super().check_filled()
    if self.positions.within(1) != self.positions:
      raise InputError(
        "model.positions.learned.max_len=0 stands for the data's seq_len; set "
        'it, or load the data first'
      )

  def shrunk(self) -> Self:
    return dataclasses.replace(super().shrunk(), width=32)
