"""The tokenizer of UTF-8 bytes, which can encode every text."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moe_jax.data.tokenizers.contract import (
  Ids,
  Token,
  Tokenizer,
  TokenizerOptions,
)


class Bytes(Tokenizer, kind='bytes'):
  """UTF-8 bytes with ids 0 to 255, and an EOS with id 256."""

  vocab_size = 257
  eos_id = 256
  identity = 'bytes'

  def encode(self, text: str) -> np.ndarray:
    """The UTF-8 bytes of `text`, int32 [N]."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Ids) -> str:
    """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    ids = self._in_vocabulary(ids)
    text_bytes = ids[ids != self.eos_id].astype(np.uint8)
    return text_bytes.tobytes().decode(errors='replace')

  def token_name(self, token: Token) -> str:
    """The character of an ASCII byte, or else the hexadecimal number."""
    (token,) = self._in_vocabulary([token]).tolist()
    if token == self.eos_id:
      return '<eos>'
    return repr(chr(token)) if token < 0x80 else f'0x{token:02x}'

  def state(self) -> dict[str, Any]:
    """An empty dict, as all tokenizers of bytes are equal."""
    return {}

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> 'Bytes':
    """See `Tokenizer.from_state`."""
    del state
    return cls()


@dataclasses.dataclass(frozen=True)
class BytesOptions(TokenizerOptions):
  """Options of the tokenizer of UTF-8 bytes."""

  def identity(self) -> str:
    """See `TokenizerOptions.identity`."""
    return Bytes.identity

  def fit(self, texts: Iterable[str]) -> Bytes:
    """The tokenizer; it does not depend on the texts."""
    del texts
    return Bytes()

  def known_vocab_size(self) -> int:
    """V = 257, for the 256 bytes and the EOS."""
    return Bytes.vocab_size
