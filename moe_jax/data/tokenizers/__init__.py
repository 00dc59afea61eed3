"""Tokenizers: text to token ids and back, and ids with a special meaning.

To add a tokenizer, write a file with a `Tokenizer` and its `TokenizerOptions`
and list the options here.
"""

from moe_jax.data.plain_files import read_json
from moe_jax.data.tokenizers.byte_tokenizer import Bytes, BytesOptions
from moe_jax.data.tokenizers.char_tokenizer import Chars, CharsOptions
from moe_jax.data.tokenizers.contract import (
  Fitted,
  Ids,
  Token,
  Tokenizer,
  TokenizerOptions,
  from_json,
  load,
)
from moe_jax.data.tokenizers.extra_ids import Extended, without_endings
from moe_jax.data.tokenizers.json_tokenizer import Json, JsonOptions
from moe_jax.data.tokenizers.sentencepiece_tokenizer import SentencePiece
from moe_jax.data.tokenizers.special_tokens import (
  SENTENCEPIECE,
  SpecialTokens,
)
from moe_jax.data.tokenizers.text_stream import TextStream
from moe_jax.data.tokenizers.tokenizer_files import FileOptions, read
from moe_jax.data.tokenizers.trained_tokenizer import TrainedOptions
from moe_jax.options import Kinds

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
  'SENTENCEPIECE',
  'TOKENIZERS',
  'Bytes',
  'BytesOptions',
  'Chars',
  'CharsOptions',
  'Extended',
  'FileOptions',
  'Fitted',
  'Ids',
  'Json',
  'JsonOptions',
  'SentencePiece',
  'SpecialTokens',
  'TextStream',
  'Token',
  'Tokenizer',
  'TokenizerOptions',
  'TrainedOptions',
  'from_json',
  'load',
  'read',
  'read_json',
  'without_endings',
]
