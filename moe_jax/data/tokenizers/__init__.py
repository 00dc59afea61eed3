"""Text to token ids and back, and what ids mean beside text.

`builtin.py` has bytes and characters, and opens the other kinds by name.
"""

from moe_jax.data.tokenizers.builtin import (
  KINDS,
  Bytes,
  Chars,
  fit,
  from_json,
  load,
  spec_identity,
)
from moe_jax.data.tokenizers.class_names import ClassNames
from moe_jax.data.tokenizers.extra_ids import Extended
from moe_jax.data.tokenizers.json_tokenizer import Json
from moe_jax.data.tokenizers.special_tokens import (
  SENTENCEPIECE,
  SpecialTokens,
  read_json,
)
from moe_jax.data.tokenizers.tokenizer_base import Ids, Token, Tokenizer

__all__ = [
  'KINDS',
  'SENTENCEPIECE',
  'Bytes',
  'Chars',
  'ClassNames',
  'Extended',
  'Ids',
  'Json',
  'SpecialTokens',
  'Token',
  'Tokenizer',
  'fit',
  'from_json',
  'load',
  'read_json',
  'spec_identity',
]
