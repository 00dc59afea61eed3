"""Text to token ids and back: bytes, characters, or a tokenizers JSON file.

Not here: training a tokenizer, and packing ids into rows (`packing.py`).
"""

import abc
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import tokenizers

from moe_jax.config import unknown

KINDS = ('bytes', 'chars', 'json:<path>')
# The end-of-document tokens of the well-known vocabularies, in the order tried.
EOS_NAMES = ('<eos>', '</s>', '<|endoftext|>', '<|end_of_text|>', '[EOS]')

Token = int | np.integer
Ids = Collection  # of integers: a list, a tuple, an array [N]


class Tokenizer(abc.ABC):
  """A fixed mapping between text and ids in [0, vocab_size).

  Attributes:
    vocab_size: V, one more than the largest id.
    eos_id: The id that ends a document; None where there is none.
    bos_id: The id that begins one; None where there is none.
    pad_id: The id of padding; None where there is none.
    identity: Equal for two tokenizers exactly when they encode alike.
  """

  vocab_size: int
  eos_id: int | None = None
  bos_id: int | None = None
  pad_id: int | None = None
  identity: str

  @property
  def start_id(self) -> int | None:
    """The first id of a decoder's input; None where there is none."""
    return self.eos_id

  @abc.abstractmethod
  def encode(self, text: str) -> np.ndarray:
    """The ids of `text`, int32 [N], without an EOS."""

  @abc.abstractmethod
  def decode(self, ids: Ids) -> str:
    """The text of `ids`; an EOS is no text.

    Raises:
      ValueError: An id is outside [0, vocab_size).
    """

  @abc.abstractmethod
  def token_name(self, token: Token) -> str:
    r"""A short printable name: `'e'`, `'\n'`, `0x80`, `<eos>`."""

  @abc.abstractmethod
  def to_json(self) -> dict[str, Any]:
    """What `from_json` builds this tokenizer from."""

  def save(self, path: str | os.PathLike) -> None:
    """Writes the tokenizer as JSON; `load` brings it back."""
    text = json.dumps(self.to_json(), indent=1)
    pathlib.Path(path).write_text(text + '\n', encoding='utf-8')

  def _in_vocabulary(self, ids: Ids) -> np.ndarray:
    ids = np.asarray(ids, np.int64).reshape(-1)
    wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
    if wrong.size:
      raise ValueError(
        f'token {wrong[0]} not in [0, vocab_size={self.vocab_size})'
      )
    return ids


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
    self.identity = f'chars:{_digest(self.characters)}'
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


class Json(Tokenizer):
  """A Hugging Face `tokenizers` model, used as it is.

  The special tokens its post-processor would add are left out; text that
  spells a special token is encoded as text, so that no document can forge an
  EOS. Truncation and padding are off. A model with neither an unknown token
  nor all bytes in its vocabulary drops what it does not know.
  """

  def __init__(self, text: str):
    try:
      self._model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
      raise ValueError(f'not a tokenizers JSON file: {error}') from error
    self._model.no_truncation()
    self._model.no_padding()
    self._model.encode_special_tokens = True
    vocabulary = self._model.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    known = [vocabulary[name] for name in EOS_NAMES if name in vocabulary]
    self.eos_id = known[0] if known else None
    self.identity = f'json:{_digest(self._model.to_str())}'

  def encode(self, text: str) -> np.ndarray:
    """The model's ids, int32 [N], without special tokens."""
    ids = self._model.encode(text, add_special_tokens=False).ids
    return np.asarray(ids, np.int32)

  def decode(self, ids: Ids) -> str:
    """The model's text; special tokens are left out."""
    return self._model.decode(self._in_vocabulary(ids).tolist())

  def token_name(self, token: Token) -> str:
    """The token's text, quoted; the vocabulary's spelling of a part of one."""
    (token,) = self._in_vocabulary([token]).tolist()
    if token == self.eos_id:
      return '<eos>'
    text = self._model.decode([token])
    if text and '\ufffd' not in text:
      return repr(text)
    return self._model.id_to_token(token) or f'<{token}>'

  def to_json(self) -> dict[str, Any]:
    """Its kind and the whole model."""
    return {'kind': 'json', 'model': json.loads(self._model.to_str())}


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
  return Json(_json_file(spec))


def spec_identity(spec: str) -> str:
  """Equal for two specs exactly when `fit` on equal texts makes equals.

  Raises:
    ValueError: As `fit`.
  """
  if spec in ('bytes', 'chars'):
    return spec
  return Json(_json_file(spec)).identity


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
    return Json(json.dumps(saved['model']))
  raise unknown('tokenizer kind', saved['kind'], ['bytes', 'chars', 'json'])


def _json_file(spec: str) -> str:
  kind, _, name = spec.partition(':')
  if kind != 'json' or not name:
    raise unknown('tokenizer', spec, KINDS)
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    raise ValueError(f'tokenizer {spec!r}: no file {path} in {os.getcwd()}')
  return path.read_text(encoding='utf-8')


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]
