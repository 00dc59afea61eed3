"""A pre-norm block: attention, an encoder's memory, then a feed-forward."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers.attention import Attention, AttentionConfig
from moe_jax.layers.attention.cache import KVCache
from moe_jax.layers.ffn import FeedForward, FfnConfig
from moe_jax.layers.moe import MoE, MoeConfig
from moe_jax.layers.norms import NormConfig, make_norm
from moe_jax.routing import MoeAux, empty_aux
from moe_jax.shapes import Array, Float, Int, Leaf


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """What every block of a stack has in common.

  Attributes:
    attention: The self-attention.
    ffn: The dense feed-forward of dense blocks, and the extra one.
    moe: The feed-forward of sparse blocks; None in a dense model.
    twin: In a dense twin, the dense feed-forward in place of `moe`.
    cross_attention: To an encoder's output, after the self-attention; None in
      encoders and decoder-only models.
    norm: Before each of them.
    dropout: Rate on what a layer adds to the residual, in training.
    extra_ffn: Whether a dense feed-forward follows each sparse one, with its
      own norm and residual (ST-MoE, OpenMoE).
    dtype: Of the residual stream.
  """

  attention: AttentionConfig
  ffn: FfnConfig
  moe: MoeConfig | None = None
  twin: FfnConfig | None = None
  cross_attention: AttentionConfig | None = None
  norm: NormConfig = NormConfig()
  dropout: float = 0.0
  extra_ffn: bool = False
  dtype: str = 'float32'

  def __post_init__(self):
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout} not in [0, 1)')


class Context(NamedTuple):
  """What all blocks of a stack read beside the residual stream.

  Attributes:
    segment_ids: int32 [B, T], or None: each row is one segment.
    token_mask: bool [B, T], False at padding.
    positions: int32 [B, T].
    bias: float32 [H, T, S] of relative positions, or None.
    memory: float [B, S, M], the encoder's output, or None.
    memory_segment_ids: int32 [B, S], or None as in `segment_ids`.
    hash_ids: uint32 [B, T], what a router hashes tokens by, or None.
  """

  segment_ids: Leaf
  token_mask: Leaf
  positions: Leaf
  bias: Leaf = None
  memory: Leaf = None
  memory_segment_ids: Leaf = None
  hash_ids: Leaf = None


class Block(nn.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x))."""

  config: BlockConfig
  sparse: bool
  train: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T M'],
    context: Context,
    cache: KVCache | None,
    layer: int | Int[Array, ''],
  ) -> tuple[Float[Array, 'B T M'], KVCache | None, MoeAux]:
    """Returns the new residual stream, the cache, and the feed-forward's aux.

    Args:
      x: The residual stream.
      context: What all blocks read.
      cache: Of the tokens before x, when decoding; it is returned with x's.
      layer: The block's number, its place in the cache.
    """
    c = self.config
    y, cache = self._attention('attention', x, context, cache, layer)
    x = x + self._dropout(y)
    if c.cross_attention is not None:
      y, cache = self._attention('cross_attention', x, context, cache, layer)
      x = x + self._dropout(y)
    h = self._norm(x, 'ffn_norm')
    if self.sparse and c.moe is not None:
      y, aux = MoE(c.moe, name='moe')(
        h, context.token_mask, self.train, context.hash_ids, layer
      )
    else:
      ffn = c.twin if self.sparse else c.ffn
      y, aux = FeedForward(ffn, name='ffn')(h, self.train), _dense_aux(c)
    x = x + self._dropout(y)
    if self.sparse and c.extra_ffn:
      h = self._norm(x, 'extra_ffn_norm')
      y = FeedForward(c.ffn, name='extra_ffn')(h, self.train)
      x = x + self._dropout(y)
    return x, cache, aux

  def _attention(self, name, x, context, cache, layer):
    c = getattr(self.config, name)
    h = self._norm(x, f'{name}_norm')
    bias = None if c.cross else context.bias
    attention = Attention(c, name=name)
    if cache is not None:
      return attention.decode(
        h, context.token_mask, context.positions, bias, cache, layer
      )
    ids = context.segment_ids
    key_ids = context.memory_segment_ids if c.cross else None
    moe = self.config.moe
    if ids is not None and moe is not None and moe.route_padding:
      # Padding that takes slots is routed by what it saw: in transformers, the
      # row's example.
      key_ids = key_ids if c.cross else ids
      ids = jnp.maximum(ids, 1)
    y = attention(
      h,
      ids,
      context.positions,
      bias,
      self.train,
      memory=context.memory if c.cross else None,
      key_segment_ids=key_ids,
    )
    return y, None

  def _norm(self, x, name):
    return make_norm(self.config.norm, self.config.dtype, name)(x)

  def _dropout(self, x):
    return nn.Dropout(self.config.dropout, deterministic=not self.train)(x)


def _dense_aux(config: BlockConfig) -> MoeAux:
  if config.moe is None:
    return empty_aux(1, 1)
  router = config.moe.router
  return empty_aux(router.num_experts, router.num_selected)
