"""The encoder-decoder Transformer: T5, Switch, ST-MoE, NLLB-MoE.

https://arxiv.org/abs/1910.10683, https://arxiv.org/abs/2101.03961,
https://arxiv.org/abs/2202.08906, https://arxiv.org/abs/2207.04672.
"""

from typing import ClassVar, Self, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.errors import InputError
from moe_jax.layers.attention import AttentionOptions
from moe_jax.layers.attention.attention import project_memory
from moe_jax.layers.attention.cache import KVCache, Memory
from moe_jax.layers.block import CROSS_ATTENTION
from moe_jax.models.embeddings import Embeddings
from moe_jax.models.flat_trees import Path
from moe_jax.models.layer_trees import periods_of
from moe_jax.models.stack import Stack, StackConfig
from moe_jax.models.transformer import Transformer, make_cache, make_context
from moe_jax.routing import GivenChoices, MoeAux
from moe_jax.shapes import Array, Bool, Float32, Int, checked


class EncoderDecoder(Transformer):
  """A model from two sequences to logits of the second one's next token.

  Attributes:
    embedding: The embeddings of tokens, for both halves, and the logits.
    encoder_blocks: The encoder's blocks, which see their whole segment.
    decoder_blocks: The decoder's blocks, which are causal and also attend to
      the encoder's output.
  """

  encoder_blocks: StackConfig
  decoder_blocks: StackConfig

  has_encoder: ClassVar[bool] = True

  def setup(self) -> None:
    """Makes the submodules; tables are in the model's own scope."""
    self.embeddings = Embeddings(self.embedding)
    nn.share_scope(self, self.embeddings)
    self.encoder = Stack(self.encoder_blocks)
    self.decoder = Stack(self.decoder_blocks)

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
  ) -> tuple[Float32[Array, 'B T V'], MoeAux]:
    """Returns float32 logits and all layers' aux, every leaf [L, ...].

    The encoder's layers come first.

    Args:
      encoder_tokens: Token ids that the encoder reads.
      tokens: Token ids that the decoder is given: the targets, one later.
      encoder_segment_ids: The example of each token in its row, from 1; 0 is
        padding. A decoder's token sees the encoder's tokens of its own example.
        Default: one example a row.
      segment_ids: The same for the decoder's tokens.
      encoder_positions: The position of each token in its example. Default:
        that in the row.
      positions: The same for the decoder's tokens.
      train: Turns on dropout and router noise (rngs 'dropout', 'router').
      encoder_task_ids: The task of each of the encoder's tokens, which an
        encoder's router by task needs.
      task_ids: The same for the decoder's tokens and router.
      encoder_given: Choices that are imposed on the routers of the encoder's L
        sparse layers, [B, S, L, K].
      given: The same for the decoder's, [B, T, L, K].

    Raises:
      ValueError: Only one of the two sequences has segments, or a router lacks
        the tasks that it needs.
    """
    if (encoder_segment_ids is None) != (segment_ids is None):
      raise InputError(
        'encoder_segment_ids and segment_ids are given together or not at all'
      )
    encoder_context = make_context(
      self.encoder_blocks,
      encoder_tokens,
      encoder_segment_ids,
      encoder_positions,
      encoder_task_ids,
      encoder_given,
    )
    memory, encoder_aux = self._encode(encoder_tokens, encoder_context, train)
    context = make_context(
      self.decoder_blocks, tokens, segment_ids, positions, task_ids, given
    )
    context = context._replace(
      memory=memory, memory_segment_ids=encoder_context.segment_ids
    )
    x = self.embeddings.embed(
      tokens, context.token_mask, context.positions, train
    )
    x, aux, _ = self.decoder(x, context, train)
    return self.embeddings.logits(x), _concatenated(encoder_aux, aux)

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
      encoder_tokens: Token ids.
      encoder_mask: False at padding.
      max_len: The most tokens that a decoder's row may have.
      encoder_positions: The position of each token. Default: that in the row.
      task_ids: The task of each row, which routers by task need.
    """
    c, encoder_task_ids = self.decoder_blocks, None
    if task_ids is not None:
      encoder_task_ids = jnp.broadcast_to(
        task_ids[:, None], encoder_tokens.shape
      )
    encoder_context = make_context(
      self.encoder_blocks,
      encoder_tokens,
      encoder_mask.astype(jnp.int32),
      encoder_positions,
      encoder_task_ids,
    )
    memory, _ = self._encode(encoder_tokens, encoder_context, train=False)
    params = nn.meta.unbox(self.variables['params']['decoder'])
    key_value_pairs = [
      self._project(layers, memory) for layers in periods_of(c, params)
    ]
    keys, values = zip(*key_value_pairs)
    keys, values = jnp.concatenate(keys), jnp.concatenate(values)
    if not c.stacked:
      keys, values = tuple(keys), tuple(values)
    cache = make_cache(c, len(encoder_tokens), max_len)
    memory = Memory(keys, values, encoder_mask)
    return cache.replace(memory=memory, task_ids=task_ids)

  def _encode(self, tokens, context, train):
    x = self.embeddings.embed(
      tokens, context.token_mask, context.positions, train, encoder=True
    )
    memory, aux, _ = self.encoder(x, context, train)
    return memory, aux

  def _project(self, layers, memory):
    """The keys and the values, [layers, B, N, S, D] each, of the layers."""
    shared = self.decoder_blocks.block.shared
    options = cast(AttentionOptions, self.decoder_blocks.block.attention)
    key_value_pairs = [
      project_memory(shared, options, params[CROSS_ATTENTION], memory)
      for params in layers
    ]
    return tuple(
      jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
      for arrays in zip(*key_value_pairs)
    )

  @property
  def stacks(self) -> tuple[tuple[Path, StackConfig], ...]:
    return (
      (('encoder',), self.encoder_blocks),
      (('decoder',), self.decoder_blocks),
    )

  @nn.nowrap
  def with_stacks(self, stacks: tuple[StackConfig, ...]) -> Self:
    encoder, decoder = stacks
    return self.clone(encoder_blocks=encoder, decoder_blocks=decoder)

  @property
  def sequences(self) -> tuple[str, ...]:
    return ('encoder_', '')

  @nn.nowrap
  def sequence_of(self, layer: int) -> str:
    return 'encoder_' if layer < len(self.encoder_blocks.sparse) else ''


def _concatenated(encoder_aux: MoeAux, aux: MoeAux) -> MoeAux:
  """The aux of both stacks, with zeros for what one of them lacks."""
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
