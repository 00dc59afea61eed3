"""Models: a model's options say what it is, and build its linen module."""

from moe_jax.config import Kinds
from moe_jax.layers.attention.cache import KVCache
from moe_jax.models.base import Model, ModelOptions
from moe_jax.models.decoder import DecoderOptions
from moe_jax.models.decoding import check_generates
from moe_jax.models.description import Layer, LayerStack, Stacks
from moe_jax.models.embeddings import EmbeddingOptions
from moe_jax.models.encoder_decoder import (
  EncoderDecoder,
  EncoderDecoderOptions,
)
from moe_jax.models.layer_options import RunShape
from moe_jax.models.lstm_lm import LstmCache, LstmLm, LstmLmOptions
from moe_jax.models.pattern import sparse_pattern
from moe_jax.models.trees import abstract_params, describe, init_params

MODELS = Kinds(
  'model',
  ModelOptions,
  {
    'decoder': DecoderOptions,
    'encoder_decoder': EncoderDecoderOptions,
    'lstm': LstmLmOptions,
  },
  inline=True,
)
Cache = KVCache | LstmCache  # the state between decoding steps

__all__ = [
  'MODELS',
  'Cache',
  'DecoderOptions',
  'EmbeddingOptions',
  'EncoderDecoder',
  'EncoderDecoderOptions',
  'Layer',
  'LayerStack',
  'LstmLm',
  'LstmLmOptions',
  'Model',
  'ModelOptions',
  'RunShape',
  'Stacks',
  'abstract_params',
  'check_generates',
  'describe',
  'init_params',
  'sparse_pattern',
]
