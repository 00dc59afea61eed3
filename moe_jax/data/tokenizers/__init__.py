"""Tokenizers: text to token ids and back, and ids with a special meaning.

To add a tokenizer, write a file with a `Tokenizer` and its `TokenizerOptions`
and list the options here.
"""

from moe_jax.config import Kinds
from moe_jax.data.tokenizers.bytes_and_chars import (
  Bytes,
  BytesOptions,
  Chars,
  CharsOptions,
)
from moe_jax.data.tokenizers.contract import (
  Fitted,
  TextStream,
  Tokenizer,
  TokenizerOptions,
  load,
)
from moe_jax.data.tokenizers.extra_ids import Extended
from moe_jax.data.tokenizers.json_tokenizer import (
  SENTENCEPIECE,
  Json,
  SpecialTokens,
)
from moe_jax.data.tokenizers.sentencepiece_tokenizer import SentencePiece
from moe_jax.data.tokenizers.tokenizer_files import (
  FileOptions,
  JsonOptions,
  read,
)
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

__all__ = [
  'RUN_FILE',
  'SENTENCEPIECE',
  'TOKENIZERS',
  'Bytes',
  'BytesOptions',
  'Chars',
  'CharsOptions',
  'Extended',
  'FileOptions',
  'Fitted',
  'Json',
  'JsonOptions',
  'SentencePiece',
  'SpecialTokens',
  'TextStream',
  'Tokenizer',
  'TokenizerOptions',
  'TrainedOptions',
  'load',
  'read',
]
