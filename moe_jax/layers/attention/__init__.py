"""Attention: projections, dot products, and what a decoder keeps."""

from moe_jax.layers.attention.attention import Attention, AttentionConfig

__all__ = ['Attention', 'AttentionConfig']
