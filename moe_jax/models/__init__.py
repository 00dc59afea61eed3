"""Models: the options of a model describe it and build its linen module."""

from moe_jax.config import Kinds
from moe_jax.layers.attention.cache import KVCache

# `import X as X` marks the name X as public.
from moe_jax.models.base import Model as Model
from moe_jax.models.base import ModelOptions as ModelOptions
from moe_jax.models.decoder import DecoderOptions as DecoderOptions
from moe_jax.models.decoding import check_generates as check_generates
from moe_jax.models.description import Layer as Layer
from moe_jax.models.description import LayerStack as LayerStack
from moe_jax.models.description import Stacks as Stacks
from moe_jax.models.embeddings import EmbeddingOptions as EmbeddingOptions
from moe_jax.models.encoder_decoder import EncoderDecoder as EncoderDecoder
from moe_jax.models.encoder_decoder import EncoderDecoderOptions
from moe_jax.models.layer_options import RunShape as RunShape
from moe_jax.models.lstm_lm import LstmCache
from moe_jax.models.lstm_lm import LstmLm as LstmLm
from moe_jax.models.lstm_lm import LstmLmOptions as LstmLmOptions
from moe_jax.models.pattern import sparse_pattern as sparse_pattern
from moe_jax.models.trees import abstract_params as abstract_params
from moe_jax.models.trees import describe as describe
from moe_jax.models.trees import init_params as init_params

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
