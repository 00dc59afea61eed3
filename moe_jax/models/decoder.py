"""The decoder-only Transformer: GLaM, Mixtral, OpenMoE, Switch-style LMs.

https://arxiv.org/abs/2112.06905, https://arxiv.org/abs/2401.04088,
https://arxiv.org/abs/2402.01739.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Self, cast

import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import OptionError, no_effect, option
from moe_jax.errors import InputError
from moe_jax.layers.attention.cache import KVCache
from moe_jax.layers.block import BlockConfig, Context
from moe_jax.layers.routers.contract import TokenInfo
from moe_jax.layers.shared import RULES
from moe_jax.models.base import Model, ModelOptions
from moe_jax.models.decoding import check_decodes, stacks_for_decoding
from moe_jax.models.description import LayerStack, Stacks
from moe_jax.models.embeddings import EmbeddingConfig, Embeddings
from moe_jax.models.layer_options import StackOptions
from moe_jax.models.logits import Logits
from moe_jax.models.stack import Padding, Stack, StackConfig
from moe_jax.partitioning import Rules
from moe_jax.routing import GivenChoices, MoeAux, rules_without_logits
from moe_jax.routing.given_choice_rule import check_given
from moe_jax.shapes import Array, Bool, Float32, Int, checked


@dataclasses.dataclass(frozen=True)
class DecoderOptions(ModelOptions, StackOptions):
  """The options of a decoder-only language model."""

  has_blocks: ClassVar[bool] = True

  num_tasks: int = option(
    0,
    'Number of tasks that routers by task tell apart; 0: that of the data, '
    'whose tasks are the sources of data.mixture.',
    minimum=0,
  )

  def build(self, rules: Rules = RULES) -> 'Decoder':
    self.check_filled()
    return Decoder(
      self.embedding_config(rules), self.stack_config(self, rules, causal=True)
    )

  def stack_config(
    self, half: StackOptions, rules: Rules, *, causal: bool
  ) -> StackConfig:
    """The configuration of the stack of an encoder or decoder.

    Args:
      half: The options of the stack's layers.
      rules: The mesh axes of each logical axis.
      causal: Whether the stack is a decoder: a token sees only tokens up to
        itself, and blocks also attend to an encoder if the model has one. In
        an encoder a token sees its whole segment.
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
        cross=causal and self.has_encoder,
        dropout=half.dropout,
        residual_multiplier=half.residual_multiplier,
        shared=self.shared(half.num_layers, rules),
      ),
      padding=self.padding,
      scan_layers=half.scan_layers,
      remat=half.remat,
      windows=half.windows if causal else (0,) * half.num_layers,
    )

  @property
  def halves(self) -> tuple[StackOptions, ...]:
    return (StackOptions(**self.stack_values),)

  def with_halves(self, *halves):
    (layers,) = halves
    return dataclasses.replace(self, **layers.stack_values)

  @property
  def padding(self) -> Padding:
    """The rule that hides padding; imported models may have another."""
    return Padding()

  def shared(self, num_layers, rules):
    shared = super().shared(num_layers, rules)
    return dataclasses.replace(shared, num_tasks=self.num_tasks)

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

  def problems(self) -> Iterator[str]:
    yield from self.decoder_problems()
    yield from self.task_problems()

  def decoder_problems(self) -> Iterator[str]:
    """Yields texts on wrong options of the decoder's layers alone."""
    yield from super().problems()
    yield from self.half_problems(self, causal=True)

  def half_problems(self, half: StackOptions, causal: bool) -> Iterator[str]:
    """Yields texts on wrong options of attention or positions in a stack.

    `half` has the options of its layers, and `causal` is True for a decoder.
    """
    try:
      attention = half.attention.within(self.width)
    except OptionError as error:
      yield from error.below('attention.').problems
      return
    name = attention.ROTATED
    width = getattr(attention, name)
    for problem in self.positions.problems_with(width, causal, name):
      yield f'positions: {problem}'

  def task_problems(self) -> Iterator[str]:
    """Yields a text if `num_tasks` is set and no router needs it."""
    if self.num_tasks and not self.routes_by_task:
      yield no_effect(
        'num_tasks', self.num_tasks, 'where no router goes by task'
      )

  def least_parameters(self) -> int:
    values = super().least_parameters()
    # Where there is an encoder, each layer of a decoder also attends to it.
    for half in (*self.halves, *[self] * self.has_encoder):
      values += half.num_layers * half.attention.kernel_values(self.width)
    return values + sum(
      half.feed_forward_parameters(self.width) for half in self.halves
    )


class Decoder(Model):
  """A model from tokens to logits of the next token.

  Attributes:
    embedding: The configuration of embeddings and logits.
    blocks: The configuration of the blocks between embeddings and logits.
  """

  embedding: EmbeddingConfig
  blocks: StackConfig

  def setup(self) -> None:
    """Makes the submodules, whose parameters are in the model's own scope."""
    self.embeddings = Embeddings(self.embedding)
    self.decoder = Stack(self.blocks)
    nn.share_scope(self, self.embeddings)
    nn.share_scope(self, self.decoder)

  @property
  def stacks(self) -> Stacks:
    return Stacks([LayerStack.of_blocks(self.blocks)])

  @nn.nowrap
  def with_stacks(self, *stacks: StackConfig) -> Self:
    """The same model with other stacks of blocks, an encoder's first."""
    (blocks,) = stacks
    return self.clone(blocks=blocks)

  @checked
  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
    positions: Int[Array, 'B T'] | None = None,
    train: bool = False,
    task_ids: Int[Array, 'B T'] | None = None,
    given: GivenChoices | None = None,
  ) -> tuple[Float32[Array, 'B T V'] | Logits, MoeAux]:
    """Returns float32 logits, and losses and statistics of layers, [L, ...].

    Args:
      tokens: Token ids.
      segment_ids: The index, from 1, of each token's document in its row; 0 is
        padding, which no router sees. Default: one document a row.
      positions: The position of each token in its document. Default: the
        position in the row.
      train: Turns on dropout and router noise (rngs 'dropout', 'router').
      task_ids: The task of each token, which a router by task needs.
      given: Choices that are imposed on the routers of the L sparse layers,
        [B, T, L, K].
    """
    context = make_context(
      self.blocks, tokens, segment_ids, positions, task_ids, given
    )
    return self.run_decoder(tokens, context, train)

  def run_decoder(
    self, tokens: Int[Array, 'B T'], context: Context, train: bool
  ) -> tuple[Float32[Array, 'B T V'] | Logits, MoeAux]:
    """The logits, and the layers' losses and statistics.

    The context has all arrays that the blocks read besides the tokens.
    """
    x = self.embeddings.embed(
      tokens, context.token_mask, context.positions, train
    )
    x, aux, _ = self.decoder(x, context, train)
    return self.embeddings.outputs(x), aux

  @nn.nowrap
  def for_decoding(self, variables, *, batch_size=1, platform='', window=0):
    if not any(stack.stacked for stack in self.stacks.blocks):
      return self, variables
    stacks, variables = stacks_for_decoding(
      self.stacks, variables, batch_size, platform, window
    )
    return self.with_stacks(*stacks), variables

  @nn.nowrap
  def make_cache(self, batch_size: int, max_len: int) -> KVCache:
    """An empty cache for rows of up to `max_len` tokens, padding included.

    Raises:
      ValueError: The router cannot route tokens one by one.
    """
    c = self.blocks
    check_decodes(c.experts)
    return KVCache.make(
      lengths=c.cache_lengths(max_len),
      stacked=c.stacked,
      batch_size=batch_size,
      max_len=max_len,
      shapes=c.block.attention.cached_shapes,
      dtype=c.block.shared.dtype,
    )

  @checked
  def decode(
    self,
    tokens: Int[Array, 'B T'],
    token_mask: Bool[Array, 'B T'],
    cache: KVCache,
  ) -> tuple[Float32[Array, 'B T V'], KVCache]:
    """Returns the logits at further tokens, and the cache with them added.

    Args:
      tokens: Token ids that follow those in the cache; a row may begin with
        padding.
      token_mask: False at padding.
      cache: The cache from `make_cache`, from `encode` or from an earlier call;
        the caller checks that the tokens fit into it, and puts `task_ids` into
        it if the decoder routes by task.
    """
    cache, positions = cache.begin(token_mask)
    x = self.embeddings.embed(tokens, token_mask, positions, train=False)
    cache, previous = cache.follow(tokens, token_mask)
    segment_ids = token_mask.astype(jnp.int32)
    context = make_context(
      self.blocks,
      tokens,
      segment_ids,
      positions,
      cache.task_ids,
      previous=previous,
    )
    x, _, new_cache = self.decoder(x, context, False, cache)
    new_cache = cast(KVCache, new_cache).advance(tokens.shape[1])
    return self.embeddings.logits(x), new_cache


def make_context(
  c: StackConfig,
  tokens: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'] | None,
  positions: Int[Array, 'B T'] | None,
  task_ids: Int[Array, 'B T'] | Int[Array, ' B'] | None = None,
  given: GivenChoices | None = None,
  previous: Array | None = None,
) -> Context:
  """The arrays that the blocks of a stack read.

  Args:
    c: The configuration of the stack.
    tokens: Token ids.
    segment_ids: The segment of each token, 0 at padding; None: each row is one
      segment.
    positions: The position of each token in its document; None: in its row.
    task_ids: The task of each token, or of each row, [B].
    given: Choices [B, T, L, K] that are imposed on the routers of the L sparse
      layers; None: routers choose.
    previous: The token before each token, when decoding; None: the token before
      it in its row.

  Raises:
    ValueError: The choices that are imposed are not those of the stack's sparse
      layers.
  """
  segments = segment_ids
  if segments is None:
    segments = jnp.ones(tokens.shape, jnp.int32)
  if positions is None:
    T = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens.shape)
  if task_ids is not None:
    task_ids = jnp.broadcast_to(task_ids.reshape(len(tokens), -1), tokens.shape)
  check_given(given, c.sparse if c.experts else ())
  if previous is None:
    previous = rules_without_logits.previous_tokens(tokens, segment_ids)
  info = TokenInfo(tokens, previous, positions, segments, task_ids)
  info = info.only(c.experts.router.reads if c.experts else ())
  return Context(
    segment_ids, segments > 0, positions, token_info=info, given=given
  )
