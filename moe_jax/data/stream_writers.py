"""Files of tokens that grow by one text at a time, and the digest of texts."""

import array
import hashlib
import pathlib

import numpy as np

from moe_jax.data.tokenizers.contract import Tokenizer
from moe_jax.errors import InputError

_STARTS = 2**16  # starts of texts that are held before they are written


class Digest:
  """The sha256 of the texts of all splits; each text's length precedes it."""

  def __init__(self):
    self._sha256 = hashlib.sha256()

  def split(self, name: str) -> None:
    """Begins the split `name`."""
    self._sha256.update(f'split {name}\n'.encode())

  def text(self, encoded: bytes) -> None:
    """Adds one document, its text in UTF-8."""
    self._sha256.update(f'text {len(encoded)}\n'.encode())
    self._sha256.update(encoded)

  def hexdigest(self) -> str:
    """The digest in 64 hexadecimal digits."""
    return self._sha256.hexdigest()


class StreamWriter:
  """Token files that grow by one text at a time.

  Attributes:
    texts: Number of texts so far.
    tokens: Number of tokens so far.
  """

  def __init__(self, path: pathlib.Path | str, tokenizer: Tokenizer):
    self._dtype = dtype_of(tokenizer)
    self._vocab_size = tokenizer.vocab_size
    self._starts = array.array('q')
    self._out = open(f'{path}.tokens', 'wb')  # noqa: SIM115 - closed below
    self._out_starts = open(f'{path}.starts', 'wb')  # noqa: SIM115
    self.tokens = self.texts = 0

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with self._out, self._out_starts:
      self._starts.tofile(self._out_starts)

  def __len__(self) -> int:
    return self.texts

  def add(self, ids: np.ndarray) -> None:
    """Adds the ids of a text.

    Raises:
      ValueError: An id is not in the vocabulary.
    """
    # Values that the file's type cannot hold would become ids of other tokens.
    if ids.dtype.kind not in 'iu' or not 0 <= ids.min() <= ids.max() < (
      self._vocab_size
    ):
      raise InputError(
        f'the tokenizer gave ids from {ids.min()} to {ids.max()} of type '
        f'{ids.dtype}, not integers in [0, vocab_size={self._vocab_size})'
      )
    self._starts.append(self.tokens)
    if len(self._starts) == _STARTS:
      self._starts.tofile(self._out_starts)
      del self._starts[:]
    self.texts += 1
    self.tokens += ids.size
    self._out.write(ids.astype(self._dtype).tobytes())


class DocumentWriter(StreamWriter):
  """Token files of documents; all end in the EOS, if the tokenizer has one.

  Documents without a token are left out, but belong to the digest.

  Args:
    path: Path of the files without a suffix.
    tokenizer: The tokenizer.
    digest: The digest to which the texts are added.
  """

  def __init__(
    self, path: pathlib.Path | str, tokenizer: Tokenizer, digest: Digest
  ):
    super().__init__(path, tokenizer)
    self._tokenizer, self._digest, self._bytes = tokenizer, digest, 0
    self._eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

  def write(self, text: str) -> None:
    """Adds a document.

    Raises:
      ValueError: It is no text, or an id is not in the vocabulary.
    """
    encoded = utf8(text)
    self._digest.text(encoded)
    self._bytes += len(encoded)
    ids = self._tokenizer.encode(text)
    if ids.size:
      self.add(np.append(ids, np.array(self._eos, ids.dtype)))

  def counts(self) -> dict[str, int]:
    """The numbers of documents, of bytes of UTF-8 and of tokens so far."""
    return {
      'documents': self.texts, 'bytes': self._bytes, 'tokens': self.tokens
    }  # fmt: skip


def dtype_of(tokenizer: Tokenizer) -> str:
  """The smallest type that holds all ids."""
  return np.min_scalar_type(tokenizer.vocab_size - 1).name


def utf8(text: str) -> bytes:
  """The text in UTF-8.

  Raises:
    ValueError: It is no text, or has a half of a character.
  """
  if not isinstance(text, str):
    raise InputError(f'the source gave {text!r:.80}, which is no text')
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise InputError(f'the source gave {text!r:.80}: {error}') from None
