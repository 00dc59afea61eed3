"""Attention: projections, dot products, and the cache of a decoder."""

from moe_jax.layers.attention.attention import Attention
from moe_jax.layers.attention.attention_options import AttentionOptions

__all__ = ['Attention', 'AttentionOptions']
