"""The contract of models: a module, its options, and one description of layers.

Training, generation, analysis and the import of checkpoints use nothing else of
a model, and never compare its kind or class.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import choice, option, required
from moe_jax.errors import InputError
from moe_jax.layers.positions import POSITIONS, Positions
from moe_jax.layers.shared import RULES, Numerics, Shared
from moe_jax.models.description import LayerStack, Stacks
from moe_jax.models.embeddings import EmbeddingConfig, EmbeddingOptions
from moe_jax.models.layer_options import LayerOptions, RunShape
from moe_jax.models.logits import by_blocks
from moe_jax.partitioning import Rules
from moe_jax.routing import GivenChoices
from moe_jax.shapes import Array, Float32

Batch = Mapping[str, Array]
_KEYS = ('tokens', 'segment_ids', 'positions')
# The keys of a batch that hold the choices of experts which are imposed on the
# routers of the L sparse layers: the indices of the experts, and whether each
# choice is served; both are [B, T, L, K].
REPLAYED = ('replayed_experts', 'replayed_kept')


class TokenLosses(NamedTuple):
  """The loss of each token, from the outputs of a model.

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
  losses and statistics of its L layers, a `MoeAux` whose leaves are [L, ...];
  flax gives the model `init` and `apply`. The methods that this class defines
  are those of a model of text, which takes tokens to logits of the next token
  and has the field `embedding: EmbeddingConfig`.

  A model that generates also has `for_decoding`, `make_cache(batch_size,
  max_len)`, whose cache has a method `take(rows)` that picks rows by index, and
  `decode(tokens, token_mask, cache)`, which returns logits and the next cache.
  In a model with an encoder, `encode` makes the cache instead of `make_cache`.
  `Decoder` describes the arguments of these methods.
  """

  if TYPE_CHECKING:  # type checkers do not see that flax defines these so

    def __hash__(self) -> int: ...
    def apply(self, *args: Any, **kwargs: Any) -> Any: ...

  @property
  def stacks(self) -> Stacks:
    """The description of the layers; by default a stack without any layer."""
    return Stacks([LayerStack()])

  @property
  def vocab_size(self) -> int:
    """V, the number of tokens."""
    return self.embedding.vocab_size

  @property
  def has_encoder(self) -> bool:
    """Whether the model reads two sequences, inputs and targets."""
    return len(self.stacks) > 1

  @nn.nowrap
  def inputs(self, batch: Batch) -> dict[str, Any]:
    """The arguments of a call of the model by name, taken from a batch.

    Each stack has `tokens`, `segment_ids`, `positions`, `task_ids` if a router
    goes by them, and `given`, the choices of experts to impose, if the batch
    has them under the names `REPLAYED`. Names of an encoder begin 'encoder_'.
    """
    inputs: dict[str, Any] = {}
    for prefix in self.stacks.sequences:
      inputs |= {f'{prefix}{key}': batch[f'{prefix}{key}'] for key in _KEYS}
      if f'{prefix}{REPLAYED[0]}' in batch:
        choices = GivenChoices(*(batch[f'{prefix}{key}'] for key in REPLAYED))
        inputs[f'{prefix}given'] = choices
    for prefix in self.stacks.task_sequences:
      inputs[f'{prefix}task_ids'] = batch.get(f'{prefix}task_ids')
    return inputs

  @nn.nowrap
  def batch_shapes(
    self, batch_size: int, seq_len: int, target_len: int = 0
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and types of a training batch's arrays, by their names.

    Args:
      batch_size: The number B of rows.
      seq_len: The length of a row in tokens; in an encoder-decoder, of an
        encoder's row.
      target_len: The length of a decoder's row in an encoder-decoder.
    """
    lengths = dict(zip(self.stacks.sequences, (seq_len, target_len)))
    names = {
      f'{prefix}{key}': length
      for prefix, length in lengths.items()
      for key in _KEYS
    }
    for prefix in self.stacks.task_sequences:
      names[f'{prefix}task_ids'] = lengths[prefix]
    names['targets'] = lengths['']
    shapes = {
      name: jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
      for name, length in names.items()
    }
    weights = jax.ShapeDtypeStruct((batch_size, lengths['']), jnp.float32)
    return {**shapes, 'loss_weights': weights}

  @nn.nowrap
  def loss(self, outputs: Any, batch: Batch) -> TokenLosses:
    """The loss of the outputs, for each token of a batch.

    `nats` is the cross-entropy of the targets, `logits_z` the squared logsumexp
    of the logits. At tokens of loss weight 0 the logits count as zeros.
    """

    def of_tokens(logits, rows):
      logits = counted(logits, rows)
      log_sum = jax.nn.logsumexp(logits, axis=-1)
      # No gather, which the compiler refuses where the vocabulary is split and
      # an enclosing map splits the batch.
      vocab_size = logits.shape[-1]
      is_target = jax.nn.one_hot(rows['targets'], vocab_size, dtype=jnp.bool_)
      of_target = jnp.where(is_target, logits, 0).sum(-1)
      return TokenLosses(log_sum - of_target, log_sum**2)

    return by_blocks(of_tokens, outputs, of_targets(batch))

  @nn.nowrap
  def with_deferred_logits(self) -> 'Model':
    """The same model, which returns `Logits`, not arrays, for `by_blocks`.

    Losses can then be computed of a block of tokens after another.

    A model without `embedding` is returned as it is.
    """
    if not hasattr(self, 'embedding'):
      return self
    return self.clone(
      embedding=dataclasses.replace(self.embedding, deferred=True)
    )

  @nn.nowrap
  def for_decoding(
    self,
    variables: dict[str, Any],
    *,
    batch_size: int = 1,
    platform: str = '',
    window: int = 0,
  ) -> tuple['Model', dict[str, Any]]:
    """The model that decodes, and its variables in the layout that it reads.

    Arrays that stack layers are copied. No choice of an expert is dropped,
    unless the capacity is part of an imported checkpoint. A model that is the
    result of an earlier call is returned as it is.

    Args:
      variables: Parameters and `router_state`, as trained or imported.
      batch_size: The number of rows that take a step together, which only the
        speed depends on.
      platform: The platform on which the model decodes; '': JAX's default
        backend.
      window: The most tokens that a decoder's token sees, itself included; 0:
        as in the model.

    Raises:
      NotImplementedError: The model does not generate.
    """
    raise NotImplementedError


def of_targets(batch: Batch) -> Batch:
  """The arrays of a batch that the loss of text reads, [B, T], by name.

  They are `targets` and `loss_weights`, as far as the batch has them.
  """
  keys = 'targets', 'loss_weights'
  return {key: batch[key] for key in keys if key in batch}


def counted(outputs: Float32[Array, '*B V'], batch: Batch) -> Array:
  """The outputs, with zeros at tokens whose loss weight in the batch is 0.

  A NaN at such a token would be 0 * NaN in the loss and in the gradient.
  Without `loss_weights` in the batch the outputs stay as they are.
  """
  weights = batch.get('loss_weights')
  if weights is None:
    return outputs
  return jnp.where((weights != 0)[..., None], outputs, 0)


@dataclasses.dataclass(frozen=True)
class ModelOptions(LayerOptions):
  """The contract of a model's options, with those that all models of text have.

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
  width: int = option(
    128, 'Width M of the residual stream, in numbers for each token.', minimum=1
  )
  use_bias: bool = option(
    False,
    'Whether attention, feed-forward layers and layer norms have biases.',
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

  @required
  def build(self, rules: Rules = RULES) -> Model:
    """The linen module of the model.

    Args:
      rules: Pairs of a logical axis and its mesh axes, the sharding table.

    Raises:
      ValueError: The vocabulary, or another size that the data decides, is
        still 0.
    """
    raise NotImplementedError

  @property
  def halves(self) -> tuple[LayerOptions, ...]:
    """The options of the layers of each stack, an encoder's first.

    In a model of Transformer blocks they are `StackOptions`.
    """
    return (self,)

  def with_halves(self, *halves: Any) -> Any:
    """The options of the same model with `halves` in place of its own.

    `halves` are the options of the layers of each stack, an encoder's first.
    """
    (options,) = halves
    return options

  def filled(self, vocab_size: int, seq_len: int, num_tasks: int = 0) -> Self:
    """The options with sizes that the data decides in place of zeros.

    Args:
      vocab_size: The number of tokens in the data.
      seq_len: The length of the longest rows in tokens.
      num_tasks: The number of tasks in the data; 0 where it has none.

    Raises:
      ValueError: The model tells fewer tokens or tasks apart than the data has.
    """
    del num_tasks
    if 0 < self.vocab_size < vocab_size:
      raise InputError(
        f'model.vocab_size={self.vocab_size} is smaller than the '
        f"tokenizer's {vocab_size}; choose the tokenizer that the model was "
        "trained with: data.tokenizer.kind='file' and its file.path"
      )
    return dataclasses.replace(
      self,
      vocab_size=self.vocab_size or vocab_size,
      positions=self.positions.within(seq_len),
    )

  def check_filled(self) -> None:
    """Raises ValueError where a size that the data decides is still 0."""
    if not self.vocab_size:
      raise InputError(
        f"model.vocab_size={self.vocab_size}: 0 stands for the tokenizer's; "
        'set it, or load the data first'
      )
    if self.positions.within(1) != self.positions:
      raise InputError(
        "model.positions.learned.max_len=0 stands for the data's seq_len; set "
        'it, or load the data first'
      )

  def least_parameters(self) -> int:
    """A lower bound on the number of parameters, computed from the options.

    Computing the bound takes no longer for a larger model. This class counts
    the tables of embeddings, logits and positions alone; a kind of model adds
    its layers.
    """
    tables = 1 if self.embedding.tie else 2
    rows = tables * self.vocab_size + self.positions.table_len
    return rows * self.width

  def problems(self) -> Iterator[str]:
    yield from super().problems()
    yield from self.leak()

  def problems_in(self, run: RunShape) -> Iterator[str]:
    """The reasons why the model cannot be trained in a run of these sizes."""
    names = 'encoder.overrides.moe.expert.format', 'moe.expert.format'
    formats = [half.moe.expert.format for half in self.halves]
    # Where encoder and decoder have the same format, the problem is reported
    # once, under the name of the decoder's option.
    for format, name in dict(zip(formats, names[-len(formats) :])).items():
      if format:
        yield (
          f'model.{name}.name={format.name!r}: kernels in codes of few bits '
          'are for evaluation and generation, and are not trained; train the '
          'run that they were made of'
        )
    lengths = {'data.seq_len': run.seq_len, 'data.target_len': run.target_len}
    for half, (name, length) in zip(self.halves, lengths.items()):
      if 0 < self.positions.table_len < length:
        yield (
          f'{name}={length} is more than the {self.positions.table_len} '
          'positions of model.positions'
        )
      yield from half.group_problems(run, name, length)

  def shared(self, num_layers: int, rules: Rules) -> Shared:
    """The settings that all layers of a stack of `num_layers` layers share.

    `rules` is the sharding table: the mesh axes of each logical axis.
    """
    return Shared(self.numerics, self.use_bias, num_layers, rules)

  def embedding_config(self, rules: Rules) -> EmbeddingConfig:
    """The configuration of the model's embedding tables and logits.

    `rules` is the sharding table: the mesh axes of each logical axis.
    """
    return EmbeddingConfig(
      self.embedding,
      self.shared(self.num_layers, rules),
      vocab_size=self.vocab_size,
      width=self.width,
      positions=self.positions,
      dropout=self.dropout,
    )

  def shrunk(self) -> Self:
    """The options of a small model, whose `vocab_size` is left to the data."""
    return dataclasses.replace(super().shrunk(), vocab_size=0, width=32)
