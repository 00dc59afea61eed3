"""Tokenizers of UTF-8 bytes, and of the characters that a data set has."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from moe_jax.data import contracts
from moe_jax.data.tokenizers.tokenizer_files import GivenOptions
from moe_jax.errors import InputError

_NAMED = 8  # characters that a message names


class Bytes(contracts.Tokenizer, kind='bytes'):
  """The tokenizer of UTF-8 bytes, whose ids are 0 to 255; 256 is the EOS."""

  vocab_size = 257
  eos_id = 256
  identity = 'bytes'

  def encode(self, text: str) -> np.ndarray:
    """The UTF-8 bytes of `text`, int32 [N]."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
    """The UTF-8 bytes of each text, uint8."""
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]

  def decode(self, ids: contracts.Ids) -> str:
    """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    ids = self._in_vocabulary(ids)
    text_bytes = ids[ids != self.eos_id].astype(np.uint8)
    return text_bytes.tobytes().decode(errors='replace')

  def token_name(self, token: contracts.Token) -> str:
    """The character of an ASCII byte, or else the byte's hexadecimal number."""
    (token,) = self._in_vocabulary([token]).tolist()
    if token == self.eos_id:
      return '<eos>'
    return repr(chr(token)) if token < 0x80 else f'0x{token:02x}'

  def state(self) -> dict[str, Any]:
    """An empty dict, as all tokenizers of bytes are equal."""
    return {}


@dataclasses.dataclass(frozen=True)
class BytesOptions(GivenOptions):
  """Options of the tokenizer of UTF-8 bytes."""

  def given(self) -> Bytes:
    return Bytes()


class Chars(contracts.Tokenizer, kind='chars'):
  """A tokenizer of given characters, whose ids are in order of code points.

  There is no EOS.
  """

  def __init__(self, characters: Iterable[str]):
    self.characters = ''.join(sorted(set(characters)))
    if not self.characters:
      raise InputError("tokenizer 'chars' needs at least one character")
    self.vocab_size = len(self.characters)
    self.identity = f'chars:{contracts.digest(self.characters)}'
    self._ids = {c: i for i, c in enumerate(self.characters)}

  def encode(self, text: str) -> np.ndarray:
    """The index of each character, int32 [N].

    Raises:
      ValueError: Some characters were not given at construction; the message
        names them.
    """
    try:
      return np.fromiter(map(self._ids.__getitem__, text), np.int32, len(text))
    except KeyError:
      missing = sorted({*text} - self._ids.keys())
    examples = ', '.join(map(repr, missing[:_NAMED]))
    more = f' and {len(missing) - _NAMED} more' * (len(missing) > _NAMED)
    noun = f'{len(missing)} characters' if len(missing) > 1 else 'character'
    raise InputError(
      f'{noun} {examples}{more} not in the vocabulary of {self.vocab_size} '
      'characters, those of the corpus that it was made of; replace them in '
      "the text, or train on bytes (tokenizer 'bytes'), which know every text"
    )

  def decode(self, ids: contracts.Ids) -> str:
    """The characters whose indices are `ids`."""
    return ''.join(self.characters[i] for i in self._in_vocabulary(ids))

  def token_name(self, token: contracts.Token) -> str:
    """The character, quoted."""
    return repr(self.decode([token]))

  def state(self) -> dict[str, Any]:
    """A dict with the characters, joined in one text."""
    return {'characters': self.characters}


@dataclasses.dataclass(frozen=True)
class CharsOptions(contracts.TokenizerOptions):
  """Options of the tokenizer of the characters that a data set has."""

  def identity(self) -> str:
    """The text 'chars', as this tokenizer has no options."""
    return 'chars'

  def fit(self, texts: Iterable[str]) -> Chars:
    """The tokenizer of all characters that the texts have."""
    # One text at a time, as all may not fit into memory.
    return Chars(itertools.chain.from_iterable(texts))
