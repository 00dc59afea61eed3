"""A pre-norm decoder block: attention, then a feed-forward."""

import dataclasses

from flax import linen as nn

from moe_jax.layers.attention import Attention, AttentionConfig
from moe_jax.layers.ffn import FeedForward, FfnConfig
from moe_jax.layers.moe import MoE, MoeConfig
from moe_jax.layers.norms import check_norm, make_norm
from moe_jax.routing import MoeAux, empty_aux
from moe_jax.shapes import Array, Bool, Float, Float32, Int


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """What every block of a model has in common.

  Attributes:
    attention: The self-attention.
    ffn: The dense feed-forward of dense blocks, and the extra one.
    moe: The feed-forward of sparse blocks; None in a dense model.
    twin: In a dense twin, the dense feed-forward in place of `moe`.
    norm: 'rmsnorm' or 'layernorm'.
    norm_epsilon: Added to the variance.
    use_bias: Whether layernorm has a bias.
    dropout: Rate on what a layer adds to the residual, in training.
    extra_ffn: Whether a dense feed-forward follows each sparse one, with its
      own norm and residual (ST-MoE, OpenMoE).
    dtype: Of the residual stream.
  """

  attention: AttentionConfig
  ffn: FfnConfig
  moe: MoeConfig | None = None
  twin: FfnConfig | None = None
  norm: str = 'rmsnorm'
  norm_epsilon: float = 1e-6
  use_bias: bool = False
  dropout: float = 0.0
  extra_ffn: bool = False
  dtype: str = 'float32'

  def __post_init__(self):
    check_norm(self.norm)
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout={self.dropout} not in [0, 1)')


class Block(nn.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x))."""

  config: BlockConfig
  sparse: bool
  train: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T M'],
    segment_ids: Int[Array, 'B T'] | None,
    token_mask: Bool[Array, 'B T'],
    positions: Int[Array, 'B T'],
    bias: Float32[Array, 'H T T'] | None = None,
  ) -> tuple[Float[Array, 'B T M'], MoeAux]:
    """Returns the new residual stream and the feed-forward's aux."""
    c = self.config
    y = Attention(c.attention, name='attention')(
      self._norm(x, 'attention_norm'), segment_ids, positions, bias, self.train
    )
    x = x + self._dropout(y)
    h = self._norm(x, 'ffn_norm')
    if self.sparse and c.moe is not None:
      y, aux = MoE(c.moe, name='moe')(h, token_mask, self.train)
    else:
      ffn = c.twin if self.sparse else c.ffn
      y, aux = FeedForward(ffn, name='ffn')(h, self.train), _dense_aux(c)
    x = x + self._dropout(y)
    if self.sparse and c.extra_ffn:
      h = self._norm(x, 'extra_ffn_norm')
      y = FeedForward(c.ffn, name='extra_ffn')(h, self.train)
      x = x + self._dropout(y)
    return x, aux

  def _norm(self, x, name):
    c = self.config
    return make_norm(
      c.norm,
      epsilon=c.norm_epsilon,
      use_bias=c.use_bias,
      dtype=c.dtype,
      name=name,
    )(x)

  def _dropout(self, x):
    return nn.Dropout(self.config.dropout, deterministic=not self.train)(x)


def _dense_aux(config: BlockConfig) -> MoeAux:
  if config.moe is None:
    return empty_aux(1, 1)
  router = config.moe.router
  return empty_aux(router.num_experts, router.num_selected)
