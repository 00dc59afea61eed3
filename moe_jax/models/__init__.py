"""Models: `build(config)` turns a config into a linen module."""

from moe_jax.models.build import build, leaks_future, sparse_pattern
from moe_jax.models.decoder import Decoder, DecoderConfig
from moe_jax.models.parameters import abstract_params, init_params

__all__ = [
  'Decoder',
  'DecoderConfig',
  'abstract_params',
  'build',
  'init_params',
  'leaks_future',
  'sparse_pattern',
]
