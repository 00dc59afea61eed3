"""Text to token ids and back: bytes, characters, or a tokenizers JSON file.

'json:<path>' names a `tokenizer.json` alone, or the folder of a model, whose
special tokens and chat template then come along.
Not here: training a tokenizer, and packing ids into rows (`data/packing.py`).
"""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from moe_jax.config import unknown
from moe_jax.data.tokenizers.class_names import ClassNames
from moe_jax.data.tokenizers.extra_ids import Extended
from moe_jax.data.tokenizers.json_tokenizer import Json
from moe_jax.data.tokenizers.special_tokens import (
  SENTENCEPIECE,
  SpecialTokens,
  read_json,
)
from moe_jax.data.tokenizers.tokenizer_base import Ids, Token, Tokenizer, digest

__all__ = [
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

KINDS = ('bytes', 'chars', 'json:<path>')


class Bytes(Tokenizer):
  """UTF-8 bytes, ids 0 to 255, and an EOS, 256; knows every text."""

  vocab_size = 257
  eos_id = 256
  identity = 'bytes'

  def encode(self, text: str) -> np.ndarray:
    """The UTF-8 bytes of `text`, int32 [N]."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Ids) -> str:
    """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    ids = self._in_vocabulary(ids)
    kept = ids[ids != self.eos_id].astype(np.uint8)
    return kept.tobytes().decode(errors='replace')

  def token_name(self, token: Token) -> str:
    """The character of an ASCII byte, the hexadecimal number of another."""
    (token,) = self._in_vocabulary([token]).tolist()
    if token == self.eos_id:
      return '<eos>'
    return repr(chr(token)) if token < 0x80 else f'0x{token:02x}'

  def to_json(self) -> dict[str, Any]:
    """Its kind; there is nothing else to keep."""
    return {'kind': 'bytes'}


class Chars(Tokenizer):
  """The given characters in code-point order; no EOS."""

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

  def to_json(self) -> dict[str, Any]:
    """Its kind and characters."""
    return {'kind': 'chars', 'characters': self.characters}


def fit(spec: str, texts: Iterable[str]) -> Tokenizer:
  """The tokenizer `spec` names; only 'chars' reads `texts`.

  Raises:
    ValueError: An unknown `spec`, or a JSON file that is missing or no
      tokenizer.
  """
  if spec == 'bytes':
    return Bytes()
  if spec == 'chars':
    return Chars(set().union(*map(set, texts)))
  return _json(spec)


def spec_identity(spec: str) -> str:
  """Equal for two specs exactly when `fit` on equal texts makes equals.

  Raises:
    ValueError: As `fit`.
  """
  if spec in ('bytes', 'chars'):
    return spec
  return _json(spec).identity


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `Tokenizer.save` wrote to `path`.

  Raises:
    ValueError: The file is not of `save`'s making.
  """
  text = pathlib.Path(path).read_text(encoding='utf-8')
  try:
    return from_json(json.loads(text))
  except (KeyError, TypeError, json.JSONDecodeError) as error:
    raise ValueError(f'{path} holds no saved tokenizer: {error!r}') from error


def from_json(saved: dict[str, Any]) -> Tokenizer:
  """The tokenizer whose `to_json` is `saved`."""
  if saved['kind'] == 'bytes':
    return Bytes()
  if saved['kind'] == 'chars':
    return Chars(saved['characters'])
  if saved['kind'] == 'json':
    special = saved.get('special')
    special = None if special is None else SpecialTokens.from_json(special)
    return Json(json.dumps(saved['model']), special)
  if saved['kind'] == 'extended':
    base = from_json(saved['base'])
    return Extended(base, saved['names'], end_inputs=saved['end_inputs'])
  if saved['kind'] == 'classes':
    return ClassNames(saved['names'], saved.get('feature_shape', ()))
  kinds = ['bytes', 'chars', 'classes', 'extended', 'json']
  raise unknown('tokenizer kind', saved['kind'], kinds)


def _json(spec: str) -> Json:
  """Of a `tokenizer.json`, or of a folder that holds one and more."""
  kind, _, name = spec.partition(':')
  if kind != 'json' or not name:
    raise unknown('tokenizer', spec, KINDS)
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return Json.from_folder(path)
  if not path.is_file():
    raise ValueError(f'tokenizer {spec!r}: no file {path} in {os.getcwd()}')
  return Json(path.read_text(encoding='utf-8'))


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
