"""The decoder-only Transformer: GLaM, Mixtral, OpenMoE, Switch-style LMs.

https://arxiv.org/abs/2112.06905, https://arxiv.org/abs/2401.04088,
https://arxiv.org/abs/2402.01739. Not here: how a config becomes a
`DecoderConfig` (`build.py`), or what is generated (`moe_jax.generation`).
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers.attention.cache import KVCache
from moe_jax.layers.block import Context
from moe_jax.layers.moe import MoeConfig
from moe_jax.models.causality import check_decodes
from moe_jax.models.embeddings import EmbeddingConfig, Embeddings
from moe_jax.models.stack import Stack, StackConfig
from moe_jax.routing import MoeAux, hash_rule
from moe_jax.shapes import Array, Bool, Float32, Int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder-only language model.

  Attributes:
    embedding: Tokens in and logits out.
    stack: The blocks between.
  """

  embedding: EmbeddingConfig
  stack: StackConfig

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.embedding.vocab_size

  @property
  def stacks(self) -> tuple[tuple[tuple[str, ...], StackConfig], ...]:
    """Every stack, and where in the tree its parameters are."""
    return (((), self.stack),)

  @property
  def sparse(self) -> tuple[bool, ...]:
    """A flag a layer: whether its feed-forward is sparse."""
    return self.stack.sparse

  def sequence_of(self, layer: int) -> str:
    """What stands before a batch's 'tokens' that a layer sees: nothing."""
    del layer
    return ''

  @property
  def moe(self) -> MoeConfig | None:
    """The sparse feed-forward; None in a dense model."""
    return self.stack.block.moe


class Decoder(nn.Module):
  """Tokens to next-token logits."""

  config: DecoderConfig

  def setup(self) -> None:
    """Makes the parts; tables stand in the model's own scope."""
    self.embeddings = Embeddings(self.config.embedding)
    self.stack = Stack(self.config.stack)
    nn.share_scope(self, self.embeddings)
    nn.share_scope(self, self.stack)

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
    positions: Int[Array, 'B T'] | None = None,
    train: bool = False,
  ) -> tuple[Float32[Array, 'B T V'], MoeAux]:
    """Returns float32 logits and the layers' aux, every leaf [L, ...].

    Args:
      tokens: Token ids.
      segment_ids: The document of each token in its row, from 1; 0 is
        padding, which no router sees. Default: one document a row.
      positions: Of each token in its document. Default: its place in the row.
      train: Turns on dropout and router noise (rngs 'dropout', 'router').
    """
    context = make_context(self.config.stack, tokens, segment_ids, positions)
    x = self.embeddings.embed(
      tokens, context.token_mask, context.positions, train
    )
    x, aux, _ = self.stack(x, context, train)
    return self.embeddings.logits(x), aux

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
      cache: From `make_cache` or an earlier call; what does not fit into it
        is the caller's to see.
    """
    return decode(self.embeddings, self.stack, tokens, token_mask, cache)

  @nn.nowrap
  def make_cache(self, batch_size: int, max_len: int) -> KVCache:
    """An empty cache for rows of up to `max_len` tokens, padding included."""
    return make_cache(self.config.stack, batch_size, max_len)

  @staticmethod
  def inputs(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The arguments of a call that are in a batch."""
    return {key: batch[key] for key in ('tokens', 'segment_ids', 'positions')}

  @staticmethod
  def example(tokens: Int[Array, 'B T']) -> dict[str, Array]:
    """The arguments of a call that has nothing but tokens."""
    return {'tokens': tokens}


def make_context(
  c: StackConfig,
  tokens: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'] | None,
  positions: Int[Array, 'B T'] | None,
) -> Context:
  """What a stack's blocks read, with the defaults of `Decoder.__call__`."""
  B, T = tokens.shape
  token_mask = jnp.ones((B, T), bool)
  if segment_ids is not None:
    token_mask = segment_ids > 0
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  previous = hash_rule.previous_tokens(tokens, segment_ids)
  ids = _hash_ids(c, tokens, previous, positions)
  return Context(segment_ids, token_mask, positions, hash_ids=ids)


def _hash_ids(c: StackConfig, tokens, previous, positions):
  """What routers hash tokens by; None where none does."""
  moe = c.block.moe
  if moe is None or moe.router.kind != 'hash':
    return None
  return hash_rule.hash_ids(moe.router.hash_of, tokens, previous, positions)


def make_cache(c: StackConfig, batch_size: int, max_len: int) -> KVCache:
  """An empty cache of a causal stack.

  Raises:
    ValueError: The stack does not decode; see `check_decodes`.
  """
  check_decodes(c)
  attention = c.block.attention
  return KVCache.make(
    num_layers=len(c.sparse),
    stacked=c.stacked,
    batch_size=batch_size,
    max_len=max_len,
    num_heads=attention.num_kv_heads,
    head_width=attention.head_width,
    dtype=attention.dtype,
  )


def decode(
  embeddings: Embeddings,
  stack: Stack,
  tokens: Int[Array, 'B T'],
  token_mask: Bool[Array, 'B T'],
  cache: KVCache,
) -> tuple[Float32[Array, 'B T V'], KVCache]:
  """One step of a causal stack; see `Decoder.decode`."""
  cache, positions = cache.begin(token_mask)
  x = embeddings.embed(tokens, token_mask, positions, train=False)
  cache, previous = cache.follow(tokens, token_mask)
  ids = _hash_ids(stack.config, tokens, previous, positions)
  context = Context(
    token_mask.astype(jnp.int32), token_mask, positions, hash_ids=ids
  )
  x, _, cache = stack(x, context, False, cache)
  return embeddings.logits(x), cache.advance(tokens.shape[1])
