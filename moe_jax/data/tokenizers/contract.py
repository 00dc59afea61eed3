"""What a tokenizer is, and the options that choose one.

A tokenizer is kept beside a run as JSON and read back by its class's name. Not
here: the kinds, one a file.
"""

import abc
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from moe_jax.options import Options, required, unknown

Token = int | np.integer
Ids = Collection  # of integers: a list, a tuple, an array [N]

# Classes by the name that their files have. A class is here once its module has
# been imported, and nothing is ever imported because a file names it.
_SAVED: dict[str, type['Tokenizer']] = {}


class Tokenizer(abc.ABC):
  """A fixed mapping between text and ids in [0, vocab_size).

  Attributes:
    kind: Name of the class in files: ours are given one, a user's class has
      'module:name'.
    vocab_size: V, one more than the largest id.
    eos_id: Id that ends a document; None where there is none.
    bos_id: Id that begins a document; None where there is none.
    pad_id: Id of padding; None where there is none.
    forced_bos_id: Id that generation emits first, whatever the model says (a
      target language); None where there is none.
    sentinel_ids: Ids that stand for masked spans, the first span's first;
      empty where the vocabulary has none of its own.
    feature_shape: Shape of an example that is no text; () of tokens.
    identity: Text that is equal for two tokenizers exactly when they encode
      alike.
  """

  kind: ClassVar[str]
  vocab_size: int
  eos_id: int | None = None
  bos_id: int | None = None
  pad_id: int | None = None
  forced_bos_id: int | None = None
  sentinel_ids: tuple[int, ...] = ()
  feature_shape: tuple[int, ...] = ()
  identity: str

  def __init_subclass__(cls, kind: str = '', **more: Any):
    super().__init_subclass__(**more)
    cls.kind = kind or f'{cls.__module__}:{cls.__qualname__}'
    _SAVED[cls.kind] = cls

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

    Unlike a document, an input has the special tokens that the tokenizer adds,
    and those that the text spells.
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
  def state(self) -> dict[str, Any]:
    """What `from_state` makes this tokenizer again from, as JSON."""

  @classmethod
  @abc.abstractmethod
  def from_state(cls, state: Mapping[str, Any]) -> 'Tokenizer':
    """The tokenizer whose `state` is `state`."""

  def to_json(self) -> dict[str, Any]:
    """The state and the name of the class, for `from_json`."""
    return {'kind': self.kind, **self.state()}

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


class TokenizerOptions(Options):
  """Contract of a choice of tokenizer."""

  @required
  def identity(self) -> str:
    """Text that is equal for two choices exactly when `fit` gives equals.

    Raises:
      ValueError: A file is missing or bad.
    """
    raise NotImplementedError

  @required
  def fit(self, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer.

    Args:
      texts: All texts of the data, for a tokenizer that depends on them.

    Raises:
      ValueError: A file is missing or bad, or the texts are too few.
    """
    raise NotImplementedError

  def known_vocab_size(self) -> int | None:
    """V of the tokenizer; None where it depends on the texts."""
    return None


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `Tokenizer.save` wrote to `path`.

  Raises:
    ValueError: The file was not written by `save`, or names a class of a
      module that has not been imported.
  """
  text = pathlib.Path(path).read_text(encoding='utf-8')
  try:
    return from_json(json.loads(text))
  except (KeyError, TypeError, json.JSONDecodeError) as error:
    raise ValueError(f'{path} holds no saved tokenizer: {error!r}') from error


def from_json(saved: Mapping[str, Any]) -> Tokenizer:
  """The tokenizer whose `to_json` is `saved`."""
  kind = saved['kind']
  if kind not in _SAVED:
    raise unknown('tokenizer kind', kind, _SAVED)
  return _SAVED[kind].from_state(saved)


def digest(text: str) -> str:
  """16 hexadecimal digits of the text's sha256."""
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]
