"""Attention: its kinds, projections, products, and the cache of a decoder."""

from moe_jax.config import Kinds
from moe_jax.layers.attention.attention import Attention as Attention
from moe_jax.layers.attention.attention import AttentionBase as AttentionBase
from moe_jax.layers.attention.attention import AttentionOptions
from moe_jax.layers.attention.latent import LatentAttention as LatentAttention
from moe_jax.layers.attention.latent import LatentOptions as LatentOptions

ATTENTIONS = Kinds(
  'attention',
  AttentionBase,
  {'heads': AttentionOptions, 'latent': LatentOptions},
  inline=True,
)
