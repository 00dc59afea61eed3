"""Models: `build(config)` turns a config into a linen module."""

from moe_jax.models.build import OF_FEATURES, Model, build
from moe_jax.models.causality import decodes, leaks_future
from moe_jax.models.decoder import Decoder, DecoderConfig
from moe_jax.models.decoding import for_decoding
from moe_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.parameters import abstract_params, init_params
from moe_jax.models.pattern import sparse_pattern

__all__ = [
  'OF_FEATURES',
  'Decoder',
  'DecoderConfig',
  'EncoderDecoder',
  'EncoderDecoderConfig',
  'Model',
  'abstract_params',
  'build',
  'decodes',
  'for_decoding',
  'init_params',
  'leaks_future',
  'sparse_pattern',
]
