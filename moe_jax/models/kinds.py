"""The kinds of models that a config can choose."""

from moe_jax.models.decoder import DecoderOptions
from moe_jax.models.encoder_decoder_options import EncoderDecoderOptions
from moe_jax.models.lstm_lm import LstmLmOptions
from moe_jax.models.model_options import ModelOptions
from moe_jax.options import Kinds

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
