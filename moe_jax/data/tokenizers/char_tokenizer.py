"""The tokenizer of the characters that the texts of the data have."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moe_jax.data.tokenizers.contract import (
  Ids,
  Token,
  Tokenizer,
  TokenizerOptions,
  digest,
)


class Chars(Tokenizer, kind='chars'):
  """The given characters in code-point order, without an EOS."""

  def __init__(self, characters: Iterable[str]):
    self.characters = ''.join(sorted(set(characters)))
    if not self.characters:
      raise ValueError("tokenizer 'chars' needs at least one character")
    self.vocab_size = len(self.characters)
    self.identity = f'chars:{digest(self.characters)}'
    self._points = _code_points(self.characters)

  def encode(self, text: str) -> np.ndarray:
    """The index of each character, int32 [N].

    Raises:
      ValueError: A character was not given at construction.
    """
    points = _code_points(text)
    ids = np.searchsorted(self._points, points)
    ids = np.minimum(ids, self.vocab_size - 1)
    unseen = np.flatnonzero(self._points[ids] != points)
    if unseen.size:
      raise ValueError(
        f'character {text[unseen[0]]!r} not in the vocabulary of '
        f'{self.vocab_size} characters, those of the corpus'
      )
    return ids.astype(np.int32)

  def decode(self, ids: Ids) -> str:
    """The characters at `ids`."""
    return ''.join(self.characters[i] for i in self._in_vocabulary(ids))

  def token_name(self, token: Token) -> str:
    """The character, quoted."""
    return repr(self.decode([token]))

  def state(self) -> dict[str, Any]:
    """The characters."""
    return {'characters': self.characters}

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> 'Chars':
    """See `Tokenizer.from_state`."""
    return cls(state['characters'])


@dataclasses.dataclass(frozen=True)
class CharsOptions(TokenizerOptions):
  """Options of the tokenizer of the texts' characters."""

  def identity(self) -> str:
    """See `TokenizerOptions.identity`."""
    return 'chars'

  def fit(self, texts: Iterable[str]) -> Chars:
    """The tokenizer of all characters of the texts, of both splits."""
    characters: set[str] = set()
    for text in texts:  # one at a time, as they may not fit into memory
      characters.update(text)
    return Chars(characters)


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
