"""The encoder-decoder Transformer: T5, Switch, ST-MoE, NLLB-MoE.

https://arxiv.org/abs/1910.10683, https://arxiv.org/abs/2101.03961,
https://arxiv.org/abs/2202.08906, https://arxiv.org/abs/2207.04672. Not here:
how a config becomes an `EncoderDecoderConfig` (`build.py`).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers.attention.attention import project_memory
from moe_jax.layers.attention.cache import KVCache, Memory
from moe_jax.layers.moe import MoeConfig
from moe_jax.models.decoder import decode, make_cache, make_context
from moe_jax.models.embeddings import EmbeddingConfig, Embeddings
from moe_jax.models.pattern import segments
from moe_jax.models.stack import Stack, StackConfig, periods
from moe_jax.routing import MoeAux
from moe_jax.shapes import Array, Bool, Float32, Int


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
  """A sequence-to-sequence model.

  Attributes:
    embedding: Tokens in, of both halves, and logits out.
    encoder: Blocks that see all of their segment.
    decoder: Causal blocks that also attend to the encoder's output.
  """

  embedding: EmbeddingConfig
  encoder: StackConfig
  decoder: StackConfig

  def __post_init__(self):
    encoder, decoder = self.encoder.block, self.decoder.block
    if encoder.attention.causal or encoder.cross_attention is not None:
      raise ValueError('an encoder is neither causal nor reads a memory')
    if not decoder.attention.causal or decoder.cross_attention is None:
      raise ValueError('a decoder is causal, and needs cross_attention')
    for name in ('num_kv_heads', 'head_width', 'dtype'):
      own = getattr(decoder.attention, name)
      cross = getattr(decoder.cross_attention, name)
      if own != cross:  # one array is the cache of both
        raise ValueError(f'cross_attention has {name}={cross}, not {own}')

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.embedding.vocab_size

  @property
  def stacks(self) -> tuple[tuple[tuple[str, ...], StackConfig], ...]:
    """Every stack, and where in the tree its parameters are."""
    return ((('encoder',), self.encoder), (('decoder',), self.decoder))

  @property
  def sparse(self) -> tuple[bool, ...]:
    """A flag a layer, the encoder's first: whether it is sparse."""
    return self.encoder.sparse + self.decoder.sparse

  def sequence_of(self, layer: int) -> str:
    """What stands before a batch's 'tokens' that a layer sees."""
    return 'encoder_' if layer < len(self.encoder.sparse) else ''

  @property
  def moe(self) -> MoeConfig | None:
    """The sparse feed-forward, the decoder's where both have one."""
    return self.decoder.block.moe or self.encoder.block.moe


class EncoderDecoder(nn.Module):
  """Two sequences to the second one's next-token logits."""

  config: EncoderDecoderConfig

  def setup(self) -> None:
    """Makes the parts; tables stand in the model's own scope."""
    c = self.config
    self.embeddings = Embeddings(c.embedding)
    nn.share_scope(self, self.embeddings)
    self.encoder, self.decoder = Stack(c.encoder), Stack(c.decoder)

  def __call__(
    self,
    encoder_tokens: Int[Array, 'B S'],
    tokens: Int[Array, 'B T'],
    encoder_segment_ids: Int[Array, 'B S'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    encoder_positions: Int[Array, 'B S'] | None = None,
    positions: Int[Array, 'B T'] | None = None,
    train: bool = False,
  ) -> tuple[Float32[Array, 'B T V'], MoeAux]:
    """Returns float32 logits and all layers' aux, every leaf [L, ...].

    The encoder's layers come first.

    Args:
      encoder_tokens: Token ids that the encoder reads.
      tokens: Token ids that the decoder is given: the targets, one later.
      encoder_segment_ids: The example of each token in its row, from 1; 0 is
        padding. A decoder's token sees the encoder's of its own example.
        Default: one example a row.
      segment_ids: Likewise.
      encoder_positions: Of each token in its example. Default: its place.
      positions: Likewise.
      train: Turns on dropout and router noise (rngs 'dropout', 'router').

    Raises:
      ValueError: One of the two has segments and the other has not.
    """
    if (encoder_segment_ids is None) != (segment_ids is None):
      raise ValueError(
        'encoder_segment_ids and segment_ids are given together or not at all'
      )
    c = self.config
    source = make_context(
      c.encoder, encoder_tokens, encoder_segment_ids, encoder_positions
    )
    memory, encoder_aux = self._encode(encoder_tokens, source, train)
    context = make_context(c.decoder, tokens, segment_ids, positions)
    context = context._replace(
      memory=memory, memory_segment_ids=source.segment_ids
    )
    x = self.embeddings.embed(
      tokens, context.token_mask, context.positions, train
    )
    x, aux, _ = self.decoder(x, context, train)
    return self.embeddings.logits(x), _joined(encoder_aux, aux)

  def encode(
    self,
    encoder_tokens: Int[Array, 'B S'],
    encoder_mask: Bool[Array, 'B S'],
    max_len: int,
    encoder_positions: Int[Array, 'B S'] | None = None,
  ) -> KVCache:
    """A cache for `decode`, with what cross-attention reads of the encoder.

    Args:
      encoder_tokens: Token ids.
      encoder_mask: False at padding.
      max_len: How many tokens the decoder may have.
      encoder_positions: Of each token. Default: its place.
    """
    c = self.config.decoder
    source = make_context(
      self.config.encoder,
      encoder_tokens,
      encoder_mask.astype(jnp.int32),
      encoder_positions,
    )
    memory, _ = self._encode(encoder_tokens, source, train=False)
    params = nn.meta.unbox(self.variables['params']['decoder'])
    projected = [
      self._project(own, len(segment.pattern), memory)
      for segment in segments(c.sparse)
      for own in periods(c, segment, params)
    ]
    keys, values = zip(*projected)
    keys, values = jnp.concatenate(keys), jnp.concatenate(values)
    if not c.stacked:
      keys, values = tuple(keys), tuple(values)
    cache = make_cache(c, len(encoder_tokens), max_len)
    return cache.replace(memory=Memory(keys, values, encoder_mask))

  def decode(
    self,
    tokens: Int[Array, 'B T'],
    token_mask: Bool[Array, 'B T'],
    cache: KVCache,
  ) -> tuple[Float32[Array, 'B T V'], KVCache]:
    """Logits of the tokens that follow those of the cache; they join it.

    Args:
      tokens: Token ids; a row's first ones may be padding.
      token_mask: False at padding.
      cache: From `encode` or an earlier call.
    """
    return decode(self.embeddings, self.decoder, tokens, token_mask, cache)

  def _encode(self, tokens, context, train):
    x = self.embeddings.embed(
      tokens, context.token_mask, context.positions, train, encoder=True
    )
    memory, aux, _ = self.encoder(x, context, train)
    return memory, aux

  def _project(self, params, period, memory):
    """Keys and values of the layers of periods: [layers, B, N, S, D] each."""
    c = self.config.decoder.block.cross_attention
    found = [
      project_memory(c, params[f'layer_{i}']['cross_attention'], memory)
      for i in range(period)
    ]
    return tuple(
      jnp.stack(kind, axis=1).reshape(-1, *kind[0].shape[1:])
      for kind in zip(*found)
    )

  @staticmethod
  def inputs(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The arguments of a call that are in a batch."""
    names = ('tokens', 'segment_ids', 'positions')
    names += tuple(f'encoder_{name}' for name in names)
    return {name: batch[name] for name in names}

  @staticmethod
  def example(tokens: Int[Array, 'B T']) -> dict[str, Array]:
    """The arguments of a call that has nothing but tokens, for both halves."""
    return {'encoder_tokens': tokens, 'tokens': tokens}


def _joined(encoder_aux: MoeAux, aux: MoeAux) -> MoeAux:
  """Both stacks' aux; one with fewer experts, or none, is filled with zeros."""

  def join(a, b):
    wide = [max(x) for x in zip(a.shape[1:], b.shape[1:])]

    def filled(x):
      missing = [(0, n - m) for n, m in zip(wide, x.shape[1:])]
      return jnp.pad(x, [(0, 0), *missing])

    return jnp.concatenate([filled(a), filled(b)])

  return jax.tree.map(join, encoder_aux, aux)
