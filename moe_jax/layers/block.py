"""A pre-norm block: attention, attention to an encoder, then a feed-forward."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from moe_jax.layers.attention import AttentionBase
from moe_jax.layers.attention.cache import KVCache
from moe_jax.layers.ffn import FeedForward, FfnOptions
from moe_jax.layers.moe import MoE
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.norms import Norm, RmsNorm
from moe_jax.layers.positions import NoPositions, Positions
from moe_jax.layers.routers.contract import TokenInfo
from moe_jax.layers.shared import Shared
from moe_jax.routing import MoeAux, empty_aux
from moe_jax.shapes import Array, Bool, Float, Int, Leaf

# The name of the submodule of a block that attends to an encoder's output.
CROSS_ATTENTION = 'cross_attention'


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """The options that all blocks of a stack share; a model makes them.

  Attributes:
    attention: The self-attention, and the attention to an encoder's output.
    ffn: The feed-forward of dense blocks, and the extra feed-forward of sparse
      blocks.
    moe: The feed-forward of sparse blocks, or their dense twin; None in a
      stack without sparse blocks.
    norm: The normalisation in front of each attention and feed-forward.
    positions: The kind of positions that queries and keys carry.
    causal: Whether a token sees the tokens up to itself, or its whole segment.
    cross: Whether the blocks attend to an encoder's output.
    dropout: The rate at which outputs of layers, hidden values and attention
      weights are dropped in training.
    residual_multiplier: The number that the output of each attention and
      feed-forward is multiplied by.
    shared: The settings that all layers of the model share.
  """

  attention: AttentionBase
  ffn: FfnOptions
  moe: MoeOptions | None = None
  norm: Norm = RmsNorm()
  positions: Positions = NoPositions()
  causal: bool = True
  cross: bool = False
  dropout: float = 0.0
  residual_multiplier: float = 1.0
  shared: Shared = Shared()


class Context(NamedTuple):
  """The arrays that all blocks of a stack read, besides the residual stream.

  Attributes:
    segment_ids: int32 [B, T], the segment that each token attends to, in its
      own sequence and in a memory; None: each row is one segment.
    token_mask: bool [B, T], False at padding.
    positions: int32 [B, T], the position of each token in its document.
    bias: float32 [H, T, S], the bias of relative positions on the scores of T
      queries and S keys, or None.
    memory: float [B, S, M], the encoder's output for its S tokens, or None.
    memory_segment_ids: int32 [B, S], the segments of the memory's tokens; None:
      each row is one segment.
    token_info: The arrays that routers read, [B, T] each.
    key_segment_ids: int32 [B, T], the segment of each token as a key, which the
      tokens of its own sequence with an equal segment id see; None:
      `segment_ids`.
    routed_mask: bool [B, T], the tokens that routers see; None: `token_mask`.
    given: `GivenChoices` of [B, T, L, K] that are imposed on the routers of the
      L sparse layers; a block gets the choices of its own layer, [B, T, K].
      None: routers choose.
  """

  segment_ids: Leaf
  token_mask: Leaf
  positions: Leaf
  bias: Leaf = None
  memory: Leaf = None
  memory_segment_ids: Leaf = None
  token_info: TokenInfo = TokenInfo()
  key_segment_ids: Leaf = None
  routed_mask: Leaf = None
  given: Leaf = None

  @property
  def routed(self) -> Bool[Array, 'B T']:
    """True at the tokens that routers see."""
    return self.token_mask if self.routed_mask is None else self.routed_mask


class Block(nn.Module):
  """Computes x + attention(norm(x)), then x + feed_forward(norm(x)).

  Attributes:
    config: The options that the block shares with the others of its stack.
    sparse: Whether the feed-forward of the block is a mixture of experts.
    train: Whether dropout and router noise are on.
  """

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
    """Returns the residual stream, the cache, and losses and statistics.

    Args:
      x: The residual stream.
      context: The arrays that all blocks read.
      cache: The cache of the tokens before x, which is returned with those of x
        added; None outside of decoding.
      layer: The index of the block, for the cache and for the router.
    """
    c, moe = self.config, self.config.moe if self.sparse else None
    h = self._norm(x, 'attention_norm')
    y, cache = self._attention(h, context, cache, layer)
    x = self._residual_sum(x, y)
    if c.cross:
      h = self._norm(x, f'{CROSS_ATTENTION}_norm')
      y, cache = self._attention(h, context, cache, layer, cross=True)
      x = self._residual_sum(x, y)
    h = self._norm(x, 'ffn_norm')
    if moe is not None and moe.num_experts:
      mixture = MoE(moe, c.shared, name='moe')
      info, given = context.token_info, context.given
      y, aux = mixture(h, context.routed, self.train, info, layer, given)
    else:
      ffn, dropout = (c.ffn, c.dropout) if moe is None else moe.twin()
      y = FeedForward(ffn, c.shared, dropout, name='ffn')(h, self.train)
      aux = empty_aux(1, 1) if c.moe is None else c.moe.dense_aux()
    x = self._residual_sum(x, y)
    if moe is not None and moe.extra_ffn:
      h = self._norm(x, 'extra_ffn_norm')
      extra = FeedForward(c.ffn, c.shared, c.dropout, name='extra_ffn')
      x = self._residual_sum(x, extra(h, self.train))
    return x, cache, aux

  def _norm(self, x, name):
    return self.config.norm.module(self.config.shared, name)(x)

  def _attention(self, h, context, cache, layer, cross=False):
    """The output of attention at the tokens h [B, T, M], and the cache after h.

    Tokens attend to their own sequence or, if `cross`, to the encoder's output.
    The cache is None outside of decoding; `layer` is the index of the block.
    """
    c, positions, ids = self.config, context.positions, context.segment_ids
    name, causal, bias = 'attention', c.causal, context.bias
    keys = dict(memory=None, key_segment_ids=context.key_segment_ids)
    if cross:
      name, causal, bias = CROSS_ATTENTION, False, None
      memory_ids = context.memory_segment_ids
      keys = dict(memory=context.memory, key_segment_ids=memory_ids)
    attention = c.attention.module(
      c.attention, c.shared, c.positions, causal, cross, c.dropout, name=name
    )
    if cache is not None:
      mask = context.token_mask
      return attention.decode(h, mask, positions, bias, cache, layer)
    return attention(h, ids, positions, bias, self.train, **keys), None

  def _residual_sum(self, x, y):
    """The residual stream x plus the output y of attention or feed-forward."""
    c = self.config
    y = nn.Dropout(c.dropout, deterministic=not self.train)(y)
    if c.residual_multiplier != 1:
      y = y * jnp.asarray(c.residual_multiplier, y.dtype)
    return x + y
