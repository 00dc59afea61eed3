"""From tokens to the residual stream, and from there to logits.

One table for both where embeddings are tied; an encoder-decoder shares it
among its halves. Not here: the layers between (`stack.py`).
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import unknown
from moe_jax.layers.initializers import Init
from moe_jax.layers.positions import sinusoids
from moe_jax.partitioning import stated
from moe_jax.shapes import Array, Bool, Float, Float32, Int

POSITIONS = ('learned', 'none', 'relative', 'rotary', 'sinusoidal')
EMBEDDING_SCALES = ('none', 'sqrt_width')
LOGITS_SCALES = ('inverse_sqrt_width', 'none')


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
  """Embeddings and logits.

  Attributes:
    vocab_size: V.
    width: M.
    positions: 'learned' or 'sinusoidal' are added to the embeddings; 'rotary',
      'relative' (T5's bias) and 'none' are not.
    max_len: Rows of the table of learned positions.
    position_offset: The number that the first position of the sinusoids has
      (fairseq and NLLB: padding id + 1). Padding gets no sinusoid, nor does a
      token with the id before the offset, even where it is not masked.
    tie_embeddings: Whether the logits use the embedding table.
    encoder_table: Whether an encoder has an embedding table of its own, as in
      transformers 5.24 where embeddings are not tied. Of imported models alone:
      no config has it.
    embedding_scale: 'sqrt_width' multiplies embeddings by sqrt(M)
      (arXiv:1706.03762, NLLB).
    logits_scale: 'inverse_sqrt_width' multiplies what the logits are made of
      by 1 / sqrt(M) (T5 and Switch with tied embeddings).
    dropout: Rate on the embedded tokens, in training.
    dtype: Of the residual stream.
    param_dtype: Of the stored parameters.
    init: How the tables and the output kernel start.
  """

  vocab_size: int
  width: int
  positions: str = 'rotary'
  max_len: int = 0
  position_offset: int = 0
  tie_embeddings: bool = True
  encoder_table: bool = False
  embedding_scale: str = 'none'
  logits_scale: str = 'none'
  dropout: float = 0.0
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  init: Init = Init()
  batch_axes: tuple[str, ...] = ('data', 'fsdp', 'expert')
  vocab_axes: tuple[str, ...] = ('tensor',)

  def __post_init__(self):
    for name, have in (
      ('positions', POSITIONS),
      ('embedding_scale', EMBEDDING_SCALES),
      ('logits_scale', LOGITS_SCALES),
    ):
      if getattr(self, name) not in have:
        raise unknown(name, getattr(self, name), have)
    for name in ('vocab_size', 'width'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if self.positions == 'learned' and self.max_len < 1:
      raise ValueError(f'learned positions need max_len={self.max_len} >= 1')
    if self.position_offset < 0:
      raise ValueError(f'position_offset={self.position_offset} is negative')


class Embeddings(nn.Module):
  """The tables, as parameters of the module that shares its scope."""

  config: EmbeddingConfig

  def setup(self) -> None:
    """Makes the tables."""
    c = self.config
    shape = (c.vocab_size, c.width)
    init = c.init.embedding(('vocab', 'embed'))
    self.embedding = self.param('embedding', init, shape, c.param_dtype)
    if c.encoder_table:
      self.encoder_embedding = self.param(
        'encoder_embedding', init, shape, c.param_dtype
      )
    if c.positions == 'learned':
      init = c.init.embedding(('positions', 'embed'))
      self.position_embedding = self.param(
        'position_embedding', init, (c.max_len, c.width), c.param_dtype
      )
    if not c.tie_embeddings:
      init = c.init.kernel(('embed', 'vocab'))
      self.w_logits = self.param('w_logits', init, shape[::-1], c.param_dtype)
    self.drop = nn.Dropout(c.dropout)

  def embed(
    self,
    tokens: Int[Array, 'B T'],
    token_mask: Bool[Array, 'B T'],
    positions: Int[Array, 'B T'],
    train: bool,
    encoder: bool = False,
  ) -> Float[Array, 'B T M']:
    """The residual stream before the first block, of either half."""
    c = self.config
    own = encoder and c.encoder_table
    table = self.encoder_embedding if own else self.embedding
    # Of one row all of it: else the compiler meets rows split by what splits M.
    x = jnp.take(stated(table, c.vocab_axes), tokens, axis=0)
    x = stated(x.astype(c.dtype), c.batch_axes)
    if c.embedding_scale == 'sqrt_width':
      x = x * jnp.sqrt(jnp.asarray(c.width, c.dtype))
    if c.positions == 'learned':
      # A decoding step is short; its cache is as long as the positions go.
      if positions.shape[1] > c.max_len:
        raise ValueError(
          f'seq_len={positions.shape[1]} > max_len={c.max_len} of the learned '
          'positions'
        )
      added = jnp.take(self.position_embedding, positions, axis=0)
      x = x + added.astype(c.dtype)
    if c.positions == 'sinusoidal':
      added = sinusoids(positions + c.position_offset, c.width)
      placed = token_mask & (tokens != c.position_offset - 1)
      x = x + jnp.where(placed[..., None], added, 0).astype(c.dtype)
    return self.drop(x, deterministic=not train)

  def logits(self, x: Float[Array, 'B T M']) -> Float32[Array, 'B T V']:
    """Float32 logits of what the last block gave."""
    c = self.config
    kernel = self.embedding.T if c.tie_embeddings else self.w_logits
    if c.logits_scale == 'inverse_sqrt_width':
      x = x * jnp.asarray(c.width**-0.5, x.dtype)
    B, T, M = x.shape
    logits = jnp.dot(
      x.reshape(B * T, M),
      kernel.astype(c.dtype),
      preferred_element_type=jnp.float32,
    )
    return logits.reshape(B, T, c.vocab_size)
