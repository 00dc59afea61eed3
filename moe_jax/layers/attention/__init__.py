"""Attention: its kinds, projections, products, and the cache of a decoder."""

from moe_jax.config import Kinds
from moe_jax.layers.attention.attention import Attention, AttentionOptions
from moe_jax.layers.attention.attention_kind import AttentionBase
from moe_jax.layers.attention.latent import LatentAttention, LatentOptions

__all__ = [
  'ATTENTIONS',
  'Attention',
  'AttentionBase',
  'AttentionOptions',
  'LatentAttention',
  'LatentOptions',
]

ATTENTIONS = Kinds(
  'attention',
  AttentionBase,
  {'heads': AttentionOptions, 'latent': LatentOptions},
  inline=True,
)
