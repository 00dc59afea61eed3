"""The embeddings of tokens, and the logits of the next token.

Where embeddings are tied, one table serves both. Encoder and decoder embed
tokens with the same table, unless `EmbeddingConfig.encoder_table` is set.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import Options, option
from moe_jax.layers import parameters
from moe_jax.layers.positions import NoPositions, Positions
from moe_jax.layers.shared import Shared
from moe_jax.models.logits import Head, Logits
from moe_jax.partitioning import by_token, stated
from moe_jax.shapes import Array, Bool, Float, Float32, Int


@dataclasses.dataclass(frozen=True)
class EmbeddingOptions(Options):
  """The options of embeddings and of logits.

  Embedded tokens are multiplied by `scale` and by `multiplier`. The last
  layer's output is multiplied by `logits_scale` before the product that makes
  the logits, to which `logits_bias` is added; then they are divided by
  `logits_divisor`.
  """

  tie: bool = option(
    True,
    'Whether logits are products with the embedding table (tied), instead of '
    'with a kernel of their own.',
  )
  scale: str = option(
    'none',
    "Factor of embedded tokens: 'none', or 'sqrt_width', the square root of "
    'the width (arXiv:1706.03762, NLLB).',
    choices=('none', 'sqrt_width'),
  )
  multiplier: float = option(
    1.0,
    'Factor of embedded tokens (Granite 3.0), beside `scale`.',
    above=0,
  )
  logits_divisor: float = option(
    1.0,
    'Number that logits are divided by (logits_scaling of Granite 3.0).',
    above=0,
  )
  logits_bias: bool = option(
    False, 'Whether logits have a learned bias for each token (Phi-3.5-MoE).'
  )
  block_mb: int = option(
    512,
    'Most MiB of float32 logits that a device computes at once for a loss or a '
    'score; more are computed by blocks of tokens, and for a gradient again. 0 '
    'sets no limit.',
    minimum=0,
    same_function=True,
  )
  logits_scale: str = option(
    'none',
    "Factor of the last layer's output before the logits: 'none', or "
    "'inverse_sqrt_width', which divides by the square root of the width (T5 "
    'and Switch with tied embeddings).',
    choices=('inverse_sqrt_width', 'none'),
  )


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
  """The options and the sizes of a model's embedding tables.

  Attributes:
    options: The options of embeddings and of logits.
    shared: The settings that all layers of the model share.
    vocab_size: V, the number of tokens.
    width: M, the width of the residual stream.
    positions: The kind of positions, which may add vectors to embedded tokens.
    encoder_table: Whether an encoder has an embedding table of its own, as in
      transformers 5.24 where embeddings are not tied. No config has this
      option: imports alone set it.
    dropout: The rate of dropout on embedded tokens in training.
    encoder_dropout: The rate of dropout on an encoder's embedded tokens; None:
      `dropout`.
    deferred: Whether the model returns `Logits` that are yet to be computed.
  """

  options: EmbeddingOptions
  shared: Shared
  vocab_size: int
  width: int
  positions: Positions = NoPositions()
  encoder_table: bool = False
  dropout: float = 0.0
  encoder_dropout: float | None = None
  deferred: bool = False


class Embeddings(nn.Module):
  """The module of the embedding tables and the logits.

  Its parameters lie in the scope of the model, not in a scope of their own.
  """

  config: EmbeddingConfig

  def setup(self) -> None:
    c, dtype = self.config, self.config.shared.param_dtype
    shape = (c.vocab_size, c.width)
    init = parameters.table(c.shared, ('vocab', 'embed'))
    self.embedding = self.param('embedding', init, shape, dtype)
    if c.encoder_table:
      self.encoder_embedding = self.param(
        'encoder_embedding', init, shape, dtype
      )
    self.position_embedding = None
    if c.positions.table_len:
      init = parameters.table(c.shared, ('positions', 'embed'))
      shape_of_table = (c.positions.table_len, c.width)
      self.position_embedding = self.param(
        'position_embedding', init, shape_of_table, dtype
      )
    if not c.options.tie:
      init = parameters.kernel(c.shared, ('embed', 'vocab'), role='head')
      self.w_logits = self.param('w_logits', init, shape[::-1], dtype)
    if c.options.logits_bias:
      init = parameters.bias(('vocab',), role='head')
      self.b_logits = self.param('b_logits', init, (c.vocab_size,), dtype)
    self.drop = self.encoder_drop = nn.Dropout(c.dropout)
    if c.encoder_dropout not in (None, c.dropout):
      self.encoder_drop = nn.Dropout(c.encoder_dropout)

  @jax.named_scope('embedding')
  def embed(
    self,
    tokens: Int[Array, 'B T'],
    token_mask: Bool[Array, 'B T'],
    positions: Int[Array, 'B T'],
    train: bool,
    encoder: bool = False,
  ) -> Float[Array, 'B T M']:
    """The residual stream before the first block, made of token ids.

    The block is the encoder's if `encoder` is True, otherwise the decoder's.
    `token_mask` is False at padding, and `train` turns on dropout.
    """
    c, shared = self.config, self.config.shared
    uses_encoder_table = encoder and c.encoder_table
    table = self.encoder_embedding if uses_encoder_table else self.embedding
    # Rows stay whole along M: the axes that split M may split the batch of x.
    table = by_token(table, shared.mesh_axes('vocab'))
    x = jnp.take(table, tokens, axis=0)
    x = stated(x.astype(shared.dtype), shared.mesh_axes('batch'))
    if c.options.scale == 'sqrt_width':
      x = x * jnp.sqrt(jnp.asarray(c.width, shared.dtype))
    if c.options.multiplier != 1:
      x = x * jnp.asarray(c.options.multiplier, x.dtype)
    x = c.positions.add(
      x, tokens, token_mask, positions, self.position_embedding
    )
    drop = self.encoder_drop if encoder else self.drop
    return drop(x, deterministic=not train)

  @jax.named_scope('logits')
  def logits(self, x: Float[Array, 'B T M']) -> Float32[Array, 'B T V']:
    """The float32 logits, from the output x of the last block."""
    logits = self._logits(x)
    return logits.head(logits.x)

  def outputs(
    self, x: Float[Array, 'B T M']
  ) -> Float32[Array, 'B T V'] | Logits:
    """The logits, or `Logits` if `deferred`, from the last block's output x."""
    return self._logits(x) if self.config.deferred else self.logits(x)

  def _logits(self, x: Float[Array, 'B T M']) -> Logits:
    c = self.config
    table = self.embedding if c.options.tie else self.w_logits.T
    table = by_token(table, c.shared.mesh_axes('vocab'))
    if c.options.logits_scale == 'inverse_sqrt_width':
      x = x * jnp.asarray(c.width**-0.5, x.dtype)
    head = Head(
      kernel=table.T,
      bias=self.b_logits if c.options.logits_bias else None,
      divisor=c.options.logits_divisor,
      block_mb=c.options.block_mb,
      row_axes=c.shared.mesh_axes('batch'),
      vocab_axes=c.shared.mesh_axes('vocab'),
    )
    return Logits(x, head)
