"""Tokenizers: text to token ids and back, and ids with a special meaning.

To add a tokenizer, write a file with a `Tokenizer` and its `TokenizerOptions`
and list the options here.
"""

from moe_jax.data.plain_files import read_json
from moe_jax.data.tokenizers.byte_tokenizer import Bytes, BytesOptions
from moe_jax.data.tokenizers.char_tokenizer import Chars, CharsOptions
from moe_jax.data.tokenizers.class_names import ClassNames
from moe_jax.data.tokenizers.contract import (
  Ids,
  Token,
  Tokenizer,
  TokenizerOptions,
  from_json,
  load,
)
from moe_jax.data.tokenizers.extra_ids import Extended
from moe_jax.data.tokenizers.json_tokenizer import Json, JsonOptions
from moe_jax.data.tokenizers.special_tokens import (
  SENTENCEPIECE,
  SpecialTokens,
)
from moe_jax.options import Kinds

TOKENIZERS = Kinds(
  'tokenizer',
  TokenizerOptions,
  {'bytes': BytesOptions, 'chars': CharsOptions, 'json': JsonOptions},
)

__all__ = [
  'SENTENCEPIECE',
  'TOKENIZERS',
  'Bytes',
  'BytesOptions',
  'Chars',
  'CharsOptions',
  'ClassNames',
  'Extended',
  'Ids',
  'Json',
  'JsonOptions',
  'SpecialTokens',
  'Token',
  'Tokenizer',
  'TokenizerOptions',
  'from_json',
  'load',
  'read_json',
]
