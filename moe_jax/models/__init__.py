"""Models: `build(config)` turns a config into a linen module."""

from moe_jax.models.build import build, sparse_pattern
from moe_jax.models.decoder import Decoder, DecoderConfig

__all__ = ['Decoder', 'DecoderConfig', 'build', 'sparse_pattern']
