"""SentencePiece models: unigram and BPE, with the library that defines them.

https://arxiv.org/abs/1808.06226.
"""

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.data.contracts import Ids, Token, Tokenizer
from moe_jax.data.plain_files import first_line
from moe_jax.errors import InputError, from_extra


def library() -> Any:
  """The library `sentencepiece`; a ValueError says how it is installed."""
  return from_extra('sentencepiece', 'sentencepiece', 'unigram tokenizers')


class SentencePiece(Tokenizer, kind='sentencepiece'):
  """A SentencePiece model, with the ids of the library `sentencepiece`.

  Normalisation, the space before a text, user-defined symbols and bytes for
  unknown characters are as the model says. Names of control symbols in a text,
  such as `</s>`, are encoded as text, so that no document can forge an EOS. In
  transformers T5 adds sentinels to these ids and NLLB shifts the ids, so that a
  checkpoint of either needs its `tokenizer.json`.

  Attributes:
    content: Content of the model's file.

  Args:
    model: Content of a `tokenizer.model` or `spiece.model`.

  Raises:
    ValueError: `model` is no SentencePiece model, or is damaged.
  """

  def __init__(self, model: bytes):
    self.content = model
    self._model = library().SentencePieceProcessor()
    try:
      self._model.LoadFromSerializedProto(model)
      self.vocab_size = self._model.get_piece_size()
      for token in range(self.vocab_size):  # a piece may not be UTF-8
        self._model.id_to_piece(token)
    except Exception as error:  # RuntimeError, UnicodeDecodeError, ...
      raise InputError(f'no SentencePiece model: {first_line(error)}') from None
    if not self.vocab_size:
      raise InputError('no SentencePiece model: it has no pieces')
    ids = self._model.eos_id(), self._model.bos_id(), self._model.pad_id()
    self.eos_id, self.bos_id, self.pad_id = (i if i >= 0 else None for i in ids)
    digest = hashlib.sha256(model).hexdigest()[:16]
    self.identity = f'sentencepiece:{digest}'

  def encode(self, text: str) -> np.ndarray:
    """The ids of a document's text, int32 [N], without control symbols."""
    return np.asarray(self._model.encode(text), np.int32)

  def decode(self, ids: Ids) -> str:
    """The text of `ids`; control symbols have no text."""
    return self._model.decode(self._in_vocabulary(ids).tolist())

  def token_name(self, token: Token) -> str:
    """The token's piece in quotes, or the name of a control symbol or byte."""
    (token,) = self._in_vocabulary([token]).tolist()
    if token == self.eos_id:
      return '<eos>'
    model: Any = self._model  # its methods are typed for lists alone
    piece = model.id_to_piece(token)
    special = model.is_control, model.is_unknown, model.is_byte
    if any(is_kind(token) for is_kind in special):
      return piece
    return repr(piece.replace('\u2581', ' '))

  def vocabulary_name(self, token: Token) -> str:
    """The piece of a token, in which U+2581 stands for a space."""
    return self._model.id_to_piece(int(token))

  def state(self) -> dict[str, Any]:
    """The content of the model's file, in base 64."""
    return {'model': base64.b64encode(self.content).decode()}

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> 'SentencePiece':
    """The tokenizer whose model `state` holds in base 64."""
    return cls(base64.b64decode(state['model'], validate=True))
