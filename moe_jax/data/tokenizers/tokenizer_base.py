"""What every tokenizer is; the kinds are in `builtin.py`."""

import abc
import hashlib
import json
import os
import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

Token = int | np.integer
Ids = Collection  # of integers: a list, a tuple, an array [N]


class Tokenizer(abc.ABC):
  """A fixed mapping between text and ids in [0, vocab_size).

  Attributes:
    vocab_size: V, one more than the largest id.
    eos_id: The id that ends a document; None where there is none.
    bos_id: The id that begins one; None where there is none.
    pad_id: The id of padding; None where there is none.
    forced_bos_id: The id that generation emits first, whatever the model
      says (a target language); None where there is none.
    sentinel_ids: The ids that stand for masked spans, the first span's first;
      empty where the vocabulary has none of its own.
    feature_shape: Of an example that is no text; () of tokens.
    identity: Equal for two tokenizers exactly when they encode alike.
  """

  vocab_size: int
  eos_id: int | None = None
  bos_id: int | None = None
  pad_id: int | None = None
  forced_bos_id: int | None = None
  sentinel_ids: tuple[int, ...] = ()
  feature_shape: tuple[int, ...] = ()
  identity: str

  @property
  def start_id(self) -> int | None:
    """The first id of a decoder's input; None where there is none."""
    return self.eos_id

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """Every id that ends generation; `eos_id` is the first."""
    return () if self.eos_id is None else (self.eos_id,)

  @abc.abstractmethod
  def encode(self, text: str) -> np.ndarray:
    """The ids of a document's text, int32 [N], without an EOS."""

  def encode_inputs(self, text: str) -> np.ndarray:
    """The ids of a model's input, int32 [N], as the model was trained on it.

    Unlike a document, it has the special tokens that the tokenizer adds, and
    those that the text spells.
    """
    return self.encode(text)

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


def digest(text: str) -> str:
  """16 hexadecimal digits of the text's sha256."""
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]
