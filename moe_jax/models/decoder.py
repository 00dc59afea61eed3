"""The decoder-only Transformer: GLaM, Mixtral, OpenMoE, Switch-style LMs.

https://arxiv.org/abs/2112.06905, https://arxiv.org/abs/2401.04088,
https://arxiv.org/abs/2402.01739. Not here: how a config becomes a
`DecoderConfig` (`build.py`), or generation.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.kernels.matmul import PRODUCT as GROUPED_PRODUCT
from moe_jax.layers.block import Block, BlockConfig
from moe_jax.layers.initializers import Init
from moe_jax.layers.matmul import PRODUCT
from moe_jax.layers.norms import make_norm
from moe_jax.layers.positions import RelativePositionBias
from moe_jax.models.pattern import Segment, segments
from moe_jax.routing import MoeAux
from moe_jax.routing.base import DECISION
from moe_jax.shapes import Array, Bool, Float, Float32, Int, Int32

POSITIONS = ('learned', 'none', 'relative', 'rotary')
REMATS = {
  'none': None,
  'full': jax.checkpoint_policies.save_only_these_names(DECISION),
  'dots': jax.checkpoint_policies.save_only_these_names(
    DECISION, PRODUCT, GROUPED_PRODUCT
  ),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder-only language model.

  Attributes:
    vocab_size: V.
    width: M.
    sparse: A flag a layer: whether its feed-forward is sparse; its length is
      L.
    block: What the layers have in common.
    positions: 'learned', 'rotary', 'relative' (T5's bias) or 'none'.
    max_len: Rows of the table of learned positions.
    tie_embeddings: Whether the logits use the embedding table.
    scan_layers: Whether the periods of the layer pattern are a loop (compile
      time independent of L) or unrolled; no number changes.
    remat: What is recomputed in the backward pass: 'none', 'full' (save
      layer inputs alone) or 'dots' (save the products with kernels: of
      attention, feed-forwards and experts). Either saves what the routers
      decided, a few integers a token, so that nothing is routed twice.
      Memory is saved where layers are a loop; in unrolled ones XLA's CPU
      compiler recomputes early, and saves none.
    param_dtype: Of the stored parameters.
    init: How embeddings and the output kernel start.
  """

  vocab_size: int
  width: int
  sparse: tuple[bool, ...]
  block: BlockConfig
  positions: str = 'rotary'
  max_len: int = 0
  tie_embeddings: bool = True
  scan_layers: bool = True
  remat: str = 'none'
  param_dtype: str = 'float32'
  init: Init = Init()

  def __post_init__(self):
    if self.positions not in POSITIONS:
      raise unknown('positions', self.positions, POSITIONS)
    if self.remat not in REMATS:
      raise unknown('remat', self.remat, REMATS)
    for name in ('vocab_size', 'width'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if self.positions == 'learned' and self.max_len < 1:
      raise ValueError(f'learned positions need max_len={self.max_len} >= 1')


class Decoder(nn.Module):
  """Tokens to next-token logits."""

  config: DecoderConfig

  @nn.compact
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
    c = self.config
    B, T = tokens.shape
    token_mask = jnp.ones((B, T), bool)
    if segment_ids is not None:
      token_mask = segment_ids > 0
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    table = self.param(
      'embedding',
      c.init.embedding(('vocab', 'embed')),
      (c.vocab_size, c.width),
      c.param_dtype,
    )
    x = jnp.take(table, tokens, axis=0).astype(c.block.dtype)
    if c.positions == 'learned':
      x = x + self._learned_positions(positions)
    x = nn.Dropout(c.block.dropout, deterministic=not train)(x)
    bias = None
    if c.positions == 'relative':
      heads = c.block.attention.num_heads
      bias = RelativePositionBias(heads, name='relative_positions')(T)
    auxes = []
    for segment in segments(c.sparse):
      layers = _segment(c, segment, train)
      x, aux = layers(x, segment_ids, token_mask, positions, bias)
      auxes.append(aux)  # every leaf [repeats, period, ...]
    aux = jax.tree.map(
      lambda *leaves: jnp.concatenate(
        [leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves]
      ),
      *auxes,
    )
    return self._logits(x, table), aux

  def _learned_positions(self, positions):
    c = self.config
    if positions.shape[1] > c.max_len:
      raise ValueError(
        f'seq_len={positions.shape[1]} > max_len={c.max_len} of the learned '
        'positions'
      )
    init = c.init.embedding(('positions', 'embed'))
    shape = (c.max_len, c.width)
    table = self.param('position_embedding', init, shape, c.param_dtype)
    return jnp.take(table, positions, axis=0).astype(c.block.dtype)

  def _logits(self, x, table):
    c = self.config
    x = make_norm(
      c.block.norm,
      epsilon=c.block.norm_epsilon,
      use_bias=c.block.use_bias,
      dtype=c.block.dtype,
      name='final_norm',
    )(x)
    if c.tie_embeddings:
      kernel = table.T
    else:
      init = c.init.kernel(('embed', 'vocab'))
      shape = (c.width, c.vocab_size)
      kernel = self.param('w_logits', init, shape, c.param_dtype)
    B, T, M = x.shape
    logits = jnp.dot(
      x.reshape(B * T, M),
      kernel.astype(c.block.dtype),
      preferred_element_type=jnp.float32,
    )
    return logits.reshape(B, T, c.vocab_size)


class Period(nn.Module):
  """One period of the layer pattern; its parameters are stacked by the scan."""

  config: DecoderConfig
  pattern: tuple[bool, ...]
  train: bool
  loops: bool

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T M'],
    segment_ids: Int[Array, 'B T'] | None,
    token_mask: Bool[Array, 'B T'],
    positions: Int32[Array, 'B T'],
    bias: Float32[Array, 'H T T'] | None,
  ) -> tuple[Float[Array, 'B T M'], MoeAux]:
    """Applies the period's blocks; aux leaves are [period, ...]."""
    c = self.config
    block = Block
    if c.remat != 'none':
      # A loop's body is never merged with its recomputation; straight code,
      # unrolled or of one period, is.
      block = nn.remat(
        Block, policy=REMATS[c.remat], prevent_cse=not self.loops
      )
    auxes = []
    for i, sparse in enumerate(self.pattern):
      layer = block(c.block, sparse, self.train, name=f'layer_{i}')
      x, aux = layer(x, segment_ids, token_mask, positions, bias)
      auxes.append(aux)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)


def _segment(c: DecoderConfig, segment: Segment, train: bool):
  """A scan over a segment's periods, unrolled where the config says so."""
  loops = c.scan_layers and segment.repeats > 1
  scanned = nn.scan(
    Period,
    variable_axes={'params': 0, 'intermediates': 0},
    split_rngs={'params': True, 'dropout': True, 'router': True},
    in_axes=nn.broadcast,
    length=segment.repeats,
    unroll=1 if loops else segment.repeats,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  return scanned(c, segment.pattern, train, loops, name=segment.name)
