"""Models: `build(config)` turns a config into a linen module."""

from moe_jax.models.adaptive import AdaptiveConfig, AdaptiveMixture
from moe_jax.models.build import OF_FEATURES, Cache, Model, build
from moe_jax.models.causality import check_generates, leaks_future
from moe_jax.models.decoder import Decoder, DecoderConfig
from moe_jax.models.decoding import for_decoding
from moe_jax.models.deep_moe import DeepMoe, DeepMoeConfig
from moe_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.lstm_lm import LstmLm, LstmLmConfig
from moe_jax.models.parameters import abstract_params, init_params
from moe_jax.models.pattern import sparse_pattern

__all__ = [
  'OF_FEATURES',
  'AdaptiveConfig',
  'AdaptiveMixture',
  'Cache',
  'Decoder',
  'DecoderConfig',
  'DeepMoe',
  'DeepMoeConfig',
  'EncoderDecoder',
  'EncoderDecoderConfig',
  'LstmLm',
  'LstmLmConfig',
  'Model',
  'abstract_params',
  'build',
  'check_generates',
  'for_decoding',
  'init_params',
  'leaks_future',
  'sparse_pattern',
]
