"""The contract of tokenizers and of their options.

A tokenizer is kept in a run's folder as JSON, with the name of its class.
"""

import abc
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from moe_jax.config import Options, required, unknown
from moe_jax.data.plain_files import parse_json, read_text
from moe_jax.errors import InputError

Token = int | np.integer
Ids = Collection  # of integers: a list, a tuple, an array [N]

# Errors that a state which `save` did not write may raise in `from_state`.
_DAMAGED = AttributeError, LookupError, RecursionError, TypeError, ValueError
# The character that stands for bytes that are no character, or not yet a whole
# character.
_UNKNOWN = '\ufffd'
# The most bytes of a UTF-8 character that lacks its last byte.
_MOST_BYTES = 3
# The number of known tokens that are decoded before the first new token.
_CONTEXT = 16
# Tokenizer classes by their names in files. A class is added when its module is
# imported; no module is imported because a file names it.
_SAVED: dict[str, type['Tokenizer']] = {}


class Tokenizer(abc.ABC):
  """A fixed mapping between text and ids in [0, vocab_size).

  Attributes:
    kind: Name of the class in files; that of a user's class is 'module:name'.
    vocab_size: V, one more than the largest id.
    eos_id: Id that ends a document; None if there is none.
    bos_id: Id that begins a document; None if there is none.
    pad_id: Id of padding; None if there is none.
    forced_bos_id: Id that generation always emits first, such as a target
      language; None if there is none.
    sentinel_ids: Ids that stand for masked spans, in order; empty if the
      vocabulary has none.
    identity: Text that is equal for two tokenizers exactly if they encode all
      texts equally.
  """

  kind: ClassVar[str]
  vocab_size: int
  eos_id: int | None = None
  bos_id: int | None = None
  pad_id: int | None = None
  forced_bos_id: int | None = None
  sentinel_ids: tuple[int, ...] = ()
  identity: str

  def __init_subclass__(cls, kind: str = '', **more: Any):
    super().__init_subclass__(**more)
    cls.kind = kind or f'{cls.__module__}:{cls.__qualname__}'
    _SAVED[cls.kind] = cls

  # A class may set these properties, too.

  @functools.cached_property
  def start_id(self) -> int | None:
    """The first id of a decoder's input; None if there is none."""
    return self.eos_id

  @functools.cached_property
  def eos_ids(self) -> tuple[int, ...]:
    """All ids that end generation, `eos_id` first."""
    return () if self.eos_id is None else (self.eos_id,)

  @functools.cached_property
  def ids_identity(self) -> str:
    """Text that is equal for two tokenizers exactly if their ids mean the same.

    Two such tokenizers may differ in whether inputs end in an EOS, which a task
    decides.
    """
    return self.identity

  @functools.cached_property
  def label(self) -> str:
    """Text about the tokenizer for the lines at the start of a run."""
    return self.identity

  @abc.abstractmethod
  def encode(self, text: str) -> np.ndarray:
    """The ids of a document's text, int32 [N], without an EOS."""

  def encode_inputs(self, text: str, *, added: bool = True) -> np.ndarray:
    """The ids of a model's input, int32 [N].

    Unlike the ids of a document, these ids include special tokens that the
    tokenizer adds, and special tokens that the text spells. Without `added`,
    they do not include the former, as a part of an input needs it.
    """
    del added
    return self.encode(text)

  @abc.abstractmethod
  def decode(self, ids: Ids) -> str:
    """The text of `ids`; an EOS has no text.

    Raises:
      ValueError: An id is outside [0, vocab_size).
    """

  @abc.abstractmethod
  def token_name(self, token: Token) -> str:
    r"""A short printable name of a token: `'e'`, `'\n'`, `0x80`, `<eos>`."""

  @abc.abstractmethod
  def state(self) -> dict[str, Any]:
    """A JSON object from which `from_state` makes an equal tokenizer."""

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> 'Tokenizer':
    """The tokenizer whose method `state` gave `state`.

    By default the state has the arguments of the class by name.
    """
    return cls(**state)

  def to_json(self) -> dict[str, Any]:
    """The state with the name of the class, for `from_json`."""
    return {'kind': self.kind, **self.state()}

  def save(self, path: str | os.PathLike) -> None:
    """Writes the tokenizer as JSON, which `load` reads.

    At any moment the file is the whole old or the whole new file.
    """
    text = json.dumps(self.to_json(), indent=1)
    path = pathlib.Path(path)
    unfinished = path.with_name(f'{path.name}.tmp')
    unfinished.write_text(text + '\n', encoding='utf-8')
    unfinished.replace(path)

  def __reduce__(self):
    """The pickled form is the state, from which an equal tokenizer is made."""
    return type(self).from_state, (self.state(),)

  def _in_vocabulary(self, ids: Ids) -> np.ndarray:
    ids = np.asarray(ids, np.int64).reshape(-1)
    wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
    if wrong.size:
      raise InputError(
        f'token {wrong[0]} not in [0, vocab_size={self.vocab_size})'
      )
    return ids


class TokenizerOptions(Options):
  """Contract of the options of a tokenizer."""

  @required
  def identity(self) -> str:
    """Text that is equal for two options exactly if `fit` gives equal results.

    Raises:
      ValueError: A file is missing or bad.
    """
    raise NotImplementedError

  @required
  def fit(self, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of these options, fitted to the texts if it depends on any.

    Args:
      texts: All texts of the data, for a tokenizer that depends on them.

    Raises:
      ValueError: A file is missing or bad, or the texts are too few.
    """
    raise NotImplementedError

  def known_vocab_size(self) -> int | None:
    """V, the size of the vocabulary; None if it depends on the texts."""
    return None


class GivenOptions(TokenizerOptions):
  """Contract of the options of a tokenizer that depends on no texts."""

  @required
  def given(self) -> Tokenizer:
    """The tokenizer of these options, which is read anew at each call.

    Raises:
      ValueError: A file is missing or bad.
    """
    raise NotImplementedError

  def identity(self) -> str:
    """The tokenizer's own identity."""
    return self.given().identity

  def fit(self, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer, whatever the texts are."""
    del texts
    return self.given()

  def known_vocab_size(self) -> int:
    """V, the size of the tokenizer's vocabulary."""
    return self.given().vocab_size


@dataclasses.dataclass(frozen=True)
class Fitted(GivenOptions):
  """A tokenizer that exists already, in place of options that would make it.

  Attributes:
    tokenizer: The tokenizer.
    replaced: The options that the tokenizer replaces, under which tokens may be
      in the cache; None if it replaces no options.
  """

  tokenizer: Tokenizer
  replaced: TokenizerOptions | None = dataclasses.field(
    default=None, compare=False
  )

  def given(self) -> Tokenizer:
    """The tokenizer that exists already."""
    return self.tokenizer


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer that `Tokenizer.save` wrote to `path`.

  Raises:
    ValueError: The file was not written by `save`, or names a class of a
      module that has not been imported.
  """
  saved = parse_json(read_text(pathlib.Path(path)), path)
  try:
    return from_json(saved)
  except _DAMAGED as error:
    reason = error if isinstance(error, InputError) else f'{error!r:.200}'
    raise InputError(f'{path} holds no saved tokenizer: {reason}') from None


def from_json(saved: Mapping[str, Any]) -> Tokenizer:
  """The tokenizer whose `to_json` is `saved`."""
  state = dict(saved)
  kind = state.pop('kind')
  if not isinstance(kind, str) or kind not in _SAVED:
    raise unknown('tokenizer kind', kind, _SAVED)
  return _SAVED[kind].from_state(state)


def digest(text: str) -> str:
  """16 hexadecimal digits of the text's sha256."""
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]


class TextStream:
  """Decodes tokens one by one; the returned texts joined are the whole text.

  The text of a token depends on the tokens before it: a word may begin with a
  space, and a character's bytes may be several tokens. So a few tokens are
  decoded again each time, and only new text is returned.

  Args:
    tokenizer: The tokenizer that decodes. Ids outside its vocabulary have no
      text.
    context: The tokens before the first added token; their text is not
      returned.
  """

  def __init__(self, tokenizer: Tokenizer, context: Iterable[Token] = ()):
    self._tokenizer = tokenizer
    self._ids = [i for i in map(int, context) if self._is_id(i)][-_CONTEXT:]
    self._settled = len(self._ids)  # ids whose text is complete and returned
    self._returned = len(self._text())  # characters that have been returned

  def add(self, token: Token) -> str:
    """Returns the text that this token completes, which may be ''."""
    if not self._is_id(int(token)):
      return ''
    self._ids.append(int(token))
    text = self._text()
    tail = text[-_MOST_BYTES:]  # more bytes may still change its unknown end
    unfinished = len(tail) - len(tail.rstrip(_UNKNOWN))
    complete = max(len(text) - unfinished, self._returned)
    new, self._returned = text[self._returned : complete], complete
    if complete == len(text):
      # The next token's text cannot depend on the tokens that are dropped here.
      self._ids = self._ids[self._settled :]
      self._settled, self._returned = len(self._ids), len(self._text())
    return new

  def end(self) -> str:
    """Returns the rest of the text, U+FFFD for bytes that are no character."""
    text = self._text()
    new, self._returned = text[self._returned :], len(text)
    return new

  def _is_id(self, token: int) -> bool:
    return 0 <= token < self._tokenizer.vocab_size

  def _text(self) -> str:
    return self._tokenizer.decode(self._ids)
