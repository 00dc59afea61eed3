"""The encoder-decoder Transformer: T5, Switch, ST-MoE, NLLB-MoE.

https://arxiv.org/abs/1910.10683, https://arxiv.org/abs/2101.03961,
https://arxiv.org/abs/2202.08906, https://arxiv.org/abs/2207.04672.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import config
from moe_jax.config import OptionError, Options, fields_of, option
from moe_jax.errors import InputError
from moe_jax.layers.attention import ATTENTIONS, AttentionOptions
from moe_jax.layers.attention.attention import project_memory
from moe_jax.layers.attention.cache import KVCache, Slots
from moe_jax.layers.block import CROSS_ATTENTION
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.retained import Retained
from moe_jax.layers.shared import RULES
from moe_jax.models.decoder import Decoder, DecoderOptions, make_context
from moe_jax.models.description import LayerStack, Stacks
from moe_jax.models.embeddings import Embeddings
from moe_jax.models.layer_options import StackOptions
from moe_jax.models.logits import Logits
from moe_jax.models.stack import Stack, StackConfig
from moe_jax.models.trees import unflatten
from moe_jax.partitioning import Rules
from moe_jax.routing import GivenChoices, MoeAux
from moe_jax.shapes import Array, Bool, Float32, Int, checked


@dataclasses.dataclass(frozen=True)
class EncoderOptions(Options):
  """The options in which an encoder differs from the decoder."""

  num_layers: int = option(
    0, 'Number of layers of the encoder; 0: model.num_layers.', minimum=0
  )
  overrides: Mapping[str, Any] = option(
    {},
    'Options of layers that have other values in the encoder, nested as in the '
    "section of the model: {'ffn': {'hidden': 64}}. They are among dropout, "
    'ffn, moe, attention, norm, scan_layers and remat.',
  )


@dataclasses.dataclass(frozen=True)
class EncoderDecoderOptions(DecoderOptions):
  """The options of a sequence-to-sequence model."""

  has_encoder: ClassVar[bool] = True

  encoder: EncoderOptions = option(
    EncoderOptions(), 'Layers of the encoder, if they differ from a decoder.'
  )

  def build(self, rules: Rules = RULES) -> 'EncoderDecoder':
    self.check_filled()
    half = self.encoder_half
    embedding = dataclasses.replace(
      self.embedding_config(rules), encoder_dropout=half.dropout
    )
    return EncoderDecoder(
      embedding,
      self.stack_config(self, rules, causal=True),
      self.stack_config(half, rules, causal=False),
    )

  @functools.cached_property
  def encoder_half(self) -> StackOptions:
    """The options of the encoder's layers, cached for all builds of the model.

    They are the decoder's options, first adapted and then changed by
    `encoder.overrides`. The adapted options have as many heads of keys and
    values as of queries, since fewer heads only make the decoder's cache
    smaller; no window; another seed for a router that draws or hashes; and no
    `moe.retained`, whose indices are those of the decoder's layers.

    Raises:
      OptionError: An override is unknown, bad or without effect.
    """
    # The number of layers and the overrides change at once, as an overridden
    # moe.layers may fit the new number of layers and not the old one.
    L = self.encoder.num_layers or self.num_layers
    changes = {'num_layers': L, **self.encoder.overrides}
    decoder = StackOptions(**self.stack_values)
    return config.overridden(StackOptions, _plain_encoder(decoder), changes)

  @property
  def halves(self) -> tuple[StackOptions, ...]:
    return self.encoder_half, *super().halves

  def with_halves(self, *halves):
    """The options of the same model with other layers in encoder and decoder.

    `halves` are the options of the encoder's layers, then of the decoder's.
    `encoder.overrides` becomes the options of the encoder's layers that differ
    from those that the decoder's options would give them.
    """
    encoder, decoder = halves
    L = encoder.num_layers
    base, changed = (
      config.keys_of(StackOptions, config.section_of(layers))
      for layers in (_plain_encoder(decoder), encoder)
    )
    base_values = {leaf.path: leaf.value for leaf in base} | {'num_layers': L}
    overrides = unflatten(
      {
        tuple(leaf.path.split('.')): leaf.value
        for leaf in changed
        if not leaf.unchosen and base_values.get(leaf.path) != leaf.value
      }
    )
    num_layers = 0 if decoder.num_layers == L else L
    return dataclasses.replace(
      self,
      encoder=EncoderOptions(num_layers, overrides),
      **decoder.stack_values,
    )

  @property
  def routes_by_task(self) -> bool:
    return super().routes_by_task or self.encoder_half.routes_by_task

  def problems(self) -> Iterator[str]:
    yield from self.decoder_problems()
    if not self.attention.crosses:
      yield (
        f'attention.kind={ATTENTIONS.name_of(self.attention)!r} has no '
        'attention to an encoder'
      )
    try:
      half = self.encoder_half
    except OptionError as error:
      yield from error.below('encoder.overrides: ').problems
      return
    yield from self.task_problems()
    if half.has_experts and self.has_experts:
      yield from _conflicts(half.moe, self.moe)
    for problem in self.half_problems(half, causal=False):
      yield f'encoder.overrides: {problem}'
    if half.attention.window:
      yield (
        f'encoder.overrides: attention.window={half.attention.window} has no '
        'effect in an encoder, whose tokens see their whole segment'
      )

  def shrunk(self) -> Self:
    without_overrides = dataclasses.replace(self, encoder=EncoderOptions())
    small = super(EncoderDecoderOptions, without_overrides).shrunk()
    return small.with_halves(self.encoder_half.shrunk(), *small.halves[1:])


def _plain_encoder(decoder: StackOptions) -> StackOptions:
  """The options of an encoder's layers before `encoder.overrides`.

  They are the decoder's, with attention as an encoder has it, another seed of
  the router, and no `moe.retained`.
  """
  moe = decoder.moe
  router: Any = moe.router
  if 'seed' in fields_of(type(router)):
    router = dataclasses.replace(router, seed=router.seed + 1)
  return dataclasses.replace(
    decoder,
    attention=decoder.attention.for_encoder(),
    moe=dataclasses.replace(moe, router=router, retained=Retained()),
  )


def _conflicts(encoder: MoeOptions, decoder: MoeOptions) -> Iterator[str]:
  """Yields a text for each option that both stacks must share and do not."""
  weights = decoder.router.loss_weights()
  for loss, weight in encoder.router.loss_weights().items():
    if weights.get(loss, weight) != weight:
      name = loss.replace('_loss', '_weight')
      yield (
        f'encoder.overrides: {name}={weight} of the router, and '
        f'{weights[loss]} in the decoder; a model has one weight for the loss'
      )
  for name in ('layer_reduce', 'replay'):
    values = [getattr(moe, name) for moe in (encoder, decoder)]
    if values[0] != values[1]:
      yield (
        f'encoder.overrides: moe.{name}={values[0]!r}, and {values[1]!r} in '
        'the decoder; a model has one for both'
      )


class EncoderDecoder(Decoder):
  """A model from two sequences to logits of the second sequence's next token.

  Encoder and decoder use the same `Embeddings`.

  Attributes:
    blocks: The decoder's blocks, which are causal and also attend to the
      encoder's output.
    encoder_blocks: The encoder's blocks, which see their whole segment.
  """

  encoder_blocks: StackConfig

  def setup(self) -> None:
    """Makes the submodules; embedding tables are in the model's own scope."""
    self.embeddings = Embeddings(self.embedding)
    nn.share_scope(self, self.embeddings)
    self.encoder = Stack(self.encoder_blocks)
    self.decoder = Stack(self.blocks)

  @property
  def stacks(self) -> Stacks:
    return Stacks(
      [
        LayerStack.of_blocks(self.encoder_blocks, ('encoder',), 'encoder_'),
        LayerStack.of_blocks(self.blocks, ('decoder',)),
      ]
    )

  @nn.nowrap
  def with_stacks(self, *stacks: StackConfig) -> Self:
    encoder, decoder = stacks
    return self.clone(encoder_blocks=encoder, blocks=decoder)

  @checked
  def __call__(
    self,
    encoder_tokens: Int[Array, 'B S'],
    tokens: Int[Array, 'B T'],
    encoder_segment_ids: Int[Array, 'B S'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    encoder_positions: Int[Array, 'B S'] | None = None,
    positions: Int[Array, 'B T'] | None = None,
    train: bool = False,
    encoder_task_ids: Int[Array, 'B S'] | None = None,
    task_ids: Int[Array, 'B T'] | None = None,
    encoder_given: GivenChoices | None = None,
    given: GivenChoices | None = None,
  ) -> tuple[Float32[Array, 'B T V'] | Logits, MoeAux]:
    """Returns float32 logits, and losses and statistics of layers, [L, ...].

    The layers of the encoder come first.

    Args:
      encoder_tokens: Token ids that the encoder reads, S in each row.
      tokens: Token ids that the decoder reads: the targets, shifted right by
        one.
      encoder_segment_ids: The index, from 1, of each token's example in its
        row; 0 is padding. A decoder's token sees the encoder's tokens of its
        own example. Default: one example a row.
      segment_ids: The index, from 1, of the example of each of the decoder's
        tokens; 0 is padding.
      encoder_positions: The position of each token in its example. Default:
        the position in the row.
      positions: The position of each of the decoder's tokens in its example.
        Default: the position in the row.
      train: Turns on dropout and router noise (rngs 'dropout', 'router').
      encoder_task_ids: The task of each of the encoder's tokens, which an
        encoder's router by task needs.
      task_ids: The task of each of the decoder's tokens, which a decoder's
        router by task needs.
      encoder_given: Choices that are imposed on the routers of the encoder's L
        sparse layers, [B, S, L, K].
      given: Choices that are imposed on the routers of the decoder's L sparse
        layers, [B, T, L, K].

    Raises:
      ValueError: Only one of the two sequences has segments, or a router lacks
        the tasks that it needs.
    """
    if (encoder_segment_ids is None) != (segment_ids is None):
      raise InputError(
        'encoder_segment_ids and segment_ids are given together or not at all'
      )
    encoded, encoder_aux = self._encode(
      encoder_tokens,
      encoder_segment_ids,
      encoder_positions,
      encoder_task_ids,
      encoder_given,
      train,
    )
    context = make_context(
      self.blocks, tokens, segment_ids, positions, task_ids, given
    )
    context = context._replace(
      memory=encoded, memory_segment_ids=encoder_segment_ids
    )
    logits, aux = self.run_decoder(tokens, context, train)
    return logits, _concatenated(encoder_aux, aux)

  @checked
  def encode(
    self,
    encoder_tokens: Int[Array, 'B S'],
    encoder_mask: Bool[Array, 'B S'],
    max_len: int,
    encoder_positions: Int[Array, 'B S'] | None = None,
    task_ids: Int[Array, ' B'] | None = None,
  ) -> KVCache:
    """A cache for `decode`, with the keys and values of cross-attention.

    Args:
      encoder_tokens: Token ids, S in each row.
      encoder_mask: False at padding.
      max_len: The most tokens that a decoder's row may have.
      encoder_positions: The position of each token in its example. Default: the
        position in the row.
      task_ids: The task of each row, which routers by task need.
    """
    segment_ids = encoder_mask.astype(jnp.int32)
    encoded, _ = self._encode(
      encoder_tokens, segment_ids, encoder_positions, task_ids
    )
    keys, values = self._project(encoded)
    cache = self.make_cache(len(encoder_tokens), max_len)
    memory = Slots(keys, values, encoder_mask)
    return cache.replace(memory=memory, task_ids=task_ids)

  def _encode(
    self, tokens, segment_ids, positions, task_ids, given=None, train=False
  ):
    """The encoder's output, and the losses and statistics of its layers.

    Tokens, segments, positions and tasks are [B, S]; tasks may be [B]. All but
    the tokens may be None. `given` imposes choices [B, S, L, K] on its routers.
    """
    context = make_context(
      self.encoder_blocks, tokens, segment_ids, positions, task_ids, given
    )
    x = self.embeddings.embed(
      tokens, context.token_mask, context.positions, train, encoder=True
    )
    encoded, aux, _ = self.encoder(x, context, train)
    return encoded, aux

  def _project(self, encoded):
    """The keys and values of each decoder layer's attention to the encoder.

    `encoded` is the encoder's output [B, S, M]. Keys and values are [B, N, S,
    D] for each layer, for N heads of keys, stacked over layers where their
    parameters are stacked.
    """
    block = self.blocks.block
    options = cast(AttentionOptions, block.attention)
    params = nn.meta.unbox(self.variables['params'])
    keys, values = zip(
      *(
        project_memory(block.shared, options, layer[CROSS_ATTENTION], encoded)
        for layer in Stacks(self.stacks[1:]).layer_trees(params)
      )
    )
    if self.blocks.stacked:
      return jnp.stack(keys), jnp.stack(values)
    return keys, values


def _concatenated(encoder_aux: MoeAux, aux: MoeAux) -> MoeAux:
  """The losses and statistics, [L, ...], of encoder's and decoder's layers.

  Zeros stand for losses and experts that one stack lacks and the other has.
  """
  losses = encoder_aux.losses | aux.losses

  def filled(aux):
    zeros = dict.fromkeys(losses, jnp.zeros_like(aux.stats.tokens))
    return aux._replace(losses=zeros | aux.losses)

  def join(a, b):
    largest = [max(x) for x in zip(a.shape[1:], b.shape[1:])]

    def padded(x):
      padding = [(0, n - m) for n, m in zip(largest, x.shape[1:])]
      return jnp.pad(x, [(0, 0), *padding])

    return jnp.concatenate([padded(a), padded(b)])

  return jax.tree.map(join, filled(encoder_aux), filled(aux))
