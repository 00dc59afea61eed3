"""The contract of models: methods of every model's module and options.

Training, generation, analysis and imports use nothing else of a model, and
never compare its kind or class.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import Options, option, required
from moe_jax.errors import InputError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.shared import RULES
from moe_jax.models.flat_trees import Path
from moe_jax.models.layer_trees import LayerPlace
from moe_jax.models.stack import StackConfig
from moe_jax.partitioning import Rules
from moe_jax.shapes import Array, Float32, Int, Leaf

Batch = Mapping[str, Array]


class TokenLosses(NamedTuple):
  """The loss of a model's outputs, for each token.

  Attributes:
    nats: float32 [B, T], the loss; it is the cross-entropy in nats, unless the
      model has a loss of its own.
    logits_z: float32 [B, T], the squared logsumexp of the output logits; None
      in a model whose outputs are not logits of tokens.
  """

  nats: Array
  logits_z: Array | None = None


class Model(nn.Module):
  """The contract of a model's module.

  A model takes what `inputs` picks from a batch and returns outputs and the
  layers' `MoeAux`, every leaf of which is [L, ...].

  Attributes:
    has_encoder: The same as in `ModelOptions`.
  """

  has_encoder: ClassVar[bool] = False

  if TYPE_CHECKING:  # type checkers do not see that flax defines it

    def __hash__(self) -> int: ...

  @property
  def vocab_size(self) -> int:
    """V, the number of tokens."""
    raise NotImplementedError

  @nn.nowrap
  def inputs(self, batch: Batch) -> dict[str, Any]:
    """The arguments of a call of the model, taken from a batch."""
    raise NotImplementedError

  @nn.nowrap
  def example(self, tokens: Int[Array, 'B T']) -> dict[str, Array]:
    """The arguments of a call of the model for tokens without anything else."""
    raise NotImplementedError

  @nn.nowrap
  def batch_shapes(
    self, batch_size: int, seq_len: int, target_len: int = 0
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and types of a training batch.

    Args:
      batch_size: The number B of rows.
      seq_len: The length of a row in tokens; in an encoder-decoder, of an
        encoder's row.
      target_len: The length of a decoder's row in an encoder-decoder.
    """
    raise NotImplementedError

  @nn.nowrap
  def loss(self, outputs: Any, batch: Batch) -> TokenLosses:
    """The loss of the outputs, for each token of a batch."""
    raise NotImplementedError

  # Layers.

  @property
  def stacks(self) -> tuple[tuple[Path, StackConfig], ...]:
    """The stacks of blocks, an encoder's first, each with its path.

    The path is that of the stack's parameters. A model without blocks has no
    stacks.
    """
    return ()

  @property
  def moes(self) -> tuple[MoeOptions | None, ...]:
    """The mixture of each layer, an encoder's first; None for a dense layer.

    Sizes that a config leaves at 0 are filled in.
    """
    return tuple(moe for _, stack in self.stacks for moe in stack.moes)

  @property
  def num_layers(self) -> int:
    """L, the number of layers, an encoder's included."""
    return len(self.moes)

  @property
  def sparse_layers(self) -> tuple[int, ...]:
    """The numbers of the layers that have experts."""
    return tuple(i for i, moe in enumerate(self.moes) if moe is not None)

  @property
  def moe(self) -> MoeOptions | None:
    """The mixture of the last layer that has one; None in a dense model."""
    return self.moes[self.sparse_layers[-1]] if self.sparse_layers else None

  def moe_of(self, layer: int) -> MoeOptions:
    """The mixture of a layer.

    Raises:
      ValueError: The layer has none.
    """
    moe = self.moes[layer] if 0 <= layer < self.num_layers else None
    if moe is None:
      raise InputError(
        f'layer {layer} has no experts; sparse layers are {self.sparse_layers}'
      )
    return moe

  @property
  def sequences(self) -> tuple[str, ...]:
    """The prefixes of the batch keys of each sequence that the model reads."""
    return ('',)

  @property
  def task_sequences(self) -> tuple[str, ...]:
    """The prefixes in `sequences` whose layers route by the tokens' tasks."""
    return ()

  @property
  def num_tasks(self) -> int:
    """The number of tasks that routers by task tell apart; 0 without any."""
    return 0

  @nn.nowrap
  def sequence_of(self, layer: int) -> str:
    """The prefix of the batch keys that hold the tokens of a layer."""
    del layer
    return ''

  @property
  def leaks_future(self) -> bool:
    """Whether later tokens can change earlier outputs."""
    return any(
      moe is not None and moe.leak() is not None
      for layer, moe in enumerate(self.moes)
      # An encoder sees all of its tokens anyway.
      if not self.sequence_of(layer)
    )

  @property
  def capacity_binds(self) -> bool:
    """Whether some layer can drop a token because an expert is full."""
    return any(moe is not None and moe.capacity.binds for moe in self.moes)

  @property
  def forced_balance(self) -> str:
    """The warning on choices that no router made; '' if none are.

    See `layers.imposed.ImposedOptions.forced`.
    """
    warnings = [
      moe.forced for moe in self.moes if moe is not None and moe.forced
    ]
    return warnings[0] if warnings else ''

  # The routers' losses and state.

  @nn.nowrap
  def loss_weights(self) -> dict[str, float]:
    """The weight of each loss of the layers' `MoeAux`, by its name."""
    weights = {}
    for moe in self.moes:
      if moe is not None:
        weights |= moe.router.loss_weights()
    return weights

  @property
  def layer_reduce(self) -> str:
    """The reduction of the losses of sparse layers to one: 'sum' or 'mean'."""
    return 'sum' if self.moe is None else self.moe.layer_reduce

  @nn.nowrap
  def routed_tokens(self, batch: Batch) -> Float32[Array, ' L']:
    """The number of a batch's tokens that each layer's router sees, at least 1.

    The routers' losses are divided by it. Padding counts if routers see it.
    """
    del batch
    return jnp.ones(self.num_layers, jnp.float32)

  @property
  def keeps_router_state(self) -> bool:
    """Whether the model has the collection `router_state`."""
    return any(moe.router.keeps_state for moe in self.moes if moe is not None)

  @nn.nowrap
  def move_router_state(
    self,
    router_state: dict[str, Any],
    load: Float32[Array, 'L E'],
    rate: Leaf | None = None,
  ) -> dict[str, Any]:
    """The collection `router_state` after an optimizer step.

    Args:
      router_state: The collection before the step.
      load: The choices of each expert in each layer, before drops, of the
        whole batch.
      rate: The amount by which a step changes it; None: that of the routers'
        options.
    """
    del load, rate
    return router_state

  @nn.nowrap
  def layer_trees(self, collection: Mapping[str, Any]) -> tuple[Any, ...]:
    """The variables of each layer in a collection; {} for a layer without."""
    raise NotImplementedError

  @nn.nowrap
  def place_of(self, path: Path) -> LayerPlace | None:
    """The layers of a stacked parameter; None for any other parameter."""
    del path

  # Generation.

  @nn.nowrap
  def for_decoding(
    self,
    variables: dict[str, Any],
    *,
    batch_size: int = 1,
    platform: str = '',
    window: int = 0,
  ) -> tuple['Model', dict[str, Any]]:
    """The model that decodes, and its variables, which are copies.

    Nothing is dropped, unless a capacity is part of an imported checkpoint.

    Args:
      variables: Parameters and `router_state`, as trained or imported.
      batch_size: The number of rows that take a step together, which only the
        speed depends on.
      platform: The platform on which it decodes; '': JAX's default backend.
      window: The most tokens that a decoder's token sees, itself included; 0:
        as in the model.

    Raises:
      ValueError: The model does not generate.
    """
    check_generates(self)
    raise NotImplementedError

  @property
  def is_for_decoding(self) -> bool:
    """Whether this is a model that `for_decoding` returned."""
    return False

  @property
  def longest(self) -> int | None:
    """The most tokens that a row can have; None where there is no bound."""
    return None

  @property
  def changes_at(self) -> int | None:
    """The position at which a row's earlier keys change, too; None: nowhere.

    A cache does not change, so that no generation may cross it.
    """
    return None

  @nn.nowrap
  def window_beyond(self, seq_len: int) -> int:
    """The window for text that is longer than the rows of training.

    Where positions are distances, or there are none, text may be of any length:
    a token then sees as many tokens as the last one of a row did.

    Args:
      seq_len: The length of the rows of training.

    Returns:
      A number of tokens; 0 where there is no bound, or a window is no use.
    """
    del seq_len
    return 0


def counted(outputs: Float32[Array, '*B V'], batch: Batch) -> Array:
  """Outputs with zeros where the loss weight is 0, whatever was there.

  A NaN there would be 0 * NaN in the loss and in the gradient.
  """
  weights = batch.get('loss_weights')
  if weights is None:
    return outputs
  return jnp.where((weights != 0)[..., None], outputs, 0)


def check_generates(model: Model) -> None:
  """Raises ValueError where a model cannot generate token by token."""
  for layer, moe in enumerate(model.moes):
    # An encoder reads its tokens at once.
    if not model.sequence_of(layer):
      check_decodes(moe)


def check_decodes(moe: MoeOptions | None) -> None:
  """Raises ValueError where a layer cannot be run token by token."""
  if moe is not None and (reason := moe.causality.undecodable):
    raise InputError(reason)


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
    minimum=0,
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
      rules: The mesh axes of each logical axis; see `ShardingOptions`.

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

  def check_filled(self) -> None:
    """Raises ValueError where a size that the data decides is still 0."""
    if not self.vocab_size:
      raise InputError(
        f"model.vocab_size={self.vocab_size}: 0 stands for the tokenizer's; "
        'set it, or load the data first'
      )
