"""Tokenizers: text to token ids and back, and ids with a special meaning.

To add a tokenizer, write a file with a `Tokenizer` and its `TokenizerOptions`
and list the options here.
"""

# `import X as X` marks the name X, which is not used here, as public.
from moe_jax.config import Kinds
from moe_jax.data.contracts import Tokenizer as Tokenizer
from moe_jax.data.contracts import TokenizerOptions
from moe_jax.data.contracts import load as load
from moe_jax.data.tokenizers.bytes_and_chars import Bytes as Bytes
from moe_jax.data.tokenizers.bytes_and_chars import BytesOptions, CharsOptions
from moe_jax.data.tokenizers.bytes_and_chars import Chars as Chars
from moe_jax.data.tokenizers.extra_ids import Extended as Extended
from moe_jax.data.tokenizers.json_tokenizer import Json as Json
from moe_jax.data.tokenizers.sentencepiece_tokenizer import (
  SentencePiece as SentencePiece,
)
from moe_jax.data.tokenizers.text_stream import TextStream as TextStream
from moe_jax.data.tokenizers.tokenizer_files import FileOptions, JsonOptions
from moe_jax.data.tokenizers.tokenizer_files import Fitted as Fitted
from moe_jax.data.tokenizers.tokenizer_files import read as read
from moe_jax.data.tokenizers.trained_tokenizer import TrainedOptions

RUN_FILE = 'tokenizer.json'  # in the folder of a run
TOKENIZERS = Kinds(
  'tokenizer',
  TokenizerOptions,
  {
    'bytes': BytesOptions,
    'chars': CharsOptions,
    'trained': TrainedOptions,
    'file': FileOptions,
    'json': JsonOptions,
  },
)
