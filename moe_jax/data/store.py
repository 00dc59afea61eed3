"""Token streams on disk: written text by text, read as memory maps.

A split of documents is one stream; a split of pairs is two.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.data.plain_files import parse_json, read_text
from moe_jax.data.tokenizers.contract import Tokenizer
from moe_jax.errors import InputError

# Memory maps that a process holds open, each with a file descriptor.
_MOST_OPEN = 256


def write_tokens(
  folder: pathlib.Path,
  splits: Mapping[str, Iterable[Any]],
  tokenizer: Tokenizer,
) -> None:
  """Tokenizes the texts of `splits`, one at a time, into `folder`.

  Documents without a token are left out. All others end in the EOS, if the
  tokenizer has one.

  Raises:
    ValueError: A split has fewer than the two tokens of one prediction.
  """
  digest, about = Digest(), {'dtype': dtype_of(tokenizer), 'splits': {}}
  for name, texts in splits.items():
    digest.split(name)
    with DocumentWriter(folder / name, tokenizer, digest) as stream:
      for text in texts:
        stream.write(text)
      about['splits'][name] = stream.counts()
    check_tokens(name, about['splits'][name])
  finish(folder, about, digest, tokenizer)


def check_tokens(split: str, counts: Mapping[str, int]) -> None:
  """Raises ValueError where a split of documents has less than two tokens."""
  if counts['tokens'] < 2:
    raise InputError(
      f'split {split!r} has {counts["tokens"]} tokens in '
      f'{counts["documents"]} documents; training needs at least 2'
    )


def write_pairs(
  folder: pathlib.Path,
  splits: Mapping[str, Iterable[Any]],
  tokenizer: Tokenizer,
) -> None:
  """Tokenizes (inputs, targets) of `splits`, one at a time, into `folder`.

  Pairs with a side without tokens are left out. No EOS is added here, so that a
  text can be cut first.

  Raises:
    ValueError: A split has no pair.
  """
  digest, about = Digest(), {'dtype': dtype_of(tokenizer), 'splits': {}}
  for name, pairs in splits.items():
    digest.split(name)
    num_bytes = 0
    with (
      StreamWriter(folder / f'{name}.inputs', tokenizer) as inputs,
      StreamWriter(folder / f'{name}.targets', tokenizer) as targets,
    ):
      for pair in pairs:
        for text in pair:
          encoded = utf8(text)
          digest.text(encoded)
          num_bytes += len(encoded)
        ids = [tokenizer.encode(text) for text in pair]
        if all(side.size for side in ids):
          inputs.add(ids[0])
          targets.add(ids[1])
    if not inputs.texts:
      raise InputError(
        f'split {name!r} has no pair of which both sides have a token'
      )
    about['splits'][name] = {
      'pairs': inputs.texts,
      'bytes': num_bytes,
      'input_tokens': inputs.tokens,
      'target_tokens': targets.tokens,
    }
  finish(folder, about, digest, tokenizer)


class Shards:
  """A stream of tokens in several files, each mapped when it is first read.

  The stream has what rows need of an array [N]: `len`, `shape`, `dtype`, slices
  without a step, and indexing by integers from 0 to N - 1 and by arrays of such
  integers.

  Attributes:
    dtype: Type of the tokens.
    shape: (N,).
  """

  def __init__(
    self, paths: Sequence[pathlib.Path], dtype: str, counts: Sequence[int]
  ):
    """Takes the files, in order, and the number of tokens in each."""
    self.dtype = np.dtype(dtype)
    self._paths = list(paths)
    self._ends = np.cumsum(counts)
    self._begins = self._ends - np.asarray(counts)
    self.shape = (int(self._ends[-1]),)
    self._file = functools.lru_cache(maxsize=_MOST_OPEN)(self._map)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(
    self, index: int | np.integer | slice | np.ndarray
  ) -> np.ndarray:
    if isinstance(index, slice):
      begin, end, step = index.indices(len(self))
      if step != 1:
        raise IndexError(f'tokens are read in order, not by step {step}')
      return self._stretch(begin, end)
    index = np.asarray(index, np.int64)
    if index.size and not 0 <= index.min() <= index.max() < len(self):
      raise IndexError(
        f'{index.min()} to {index.max()} of {len(self)} tokens, from 0'
      )
    flat = index.reshape(-1)
    file = np.searchsorted(self._ends, flat, side='right')
    tokens = np.empty(flat.size, self.dtype)
    # Sorting small integers takes a fraction of a pass for each file.
    small = file.astype(np.uint16 if len(self._paths) < 2**16 else np.int64)
    order = np.argsort(small, kind='stable')
    files, cuts = np.unique(file[order], return_index=True)
    for i, chosen in zip(files.tolist(), np.split(order, cuts[1:])):
      tokens[chosen] = self._file(i)[flat[chosen] - self._begins[i]]
    return tokens.reshape(index.shape)

  def _stretch(self, begin: int, end: int) -> np.ndarray:
    """The tokens of [begin, end)."""
    if begin >= end:
      return np.zeros(0, self.dtype)
    first, last = np.searchsorted(self._ends, [begin, end - 1], side='right')
    parts = []
    for i in range(first, last + 1):
      start = int(self._begins[i])
      parts.append(self._file(i)[max(begin - start, 0) : end - start])
    return np.concatenate(parts)

  def _map(self, number: int) -> np.ndarray:
    count = int(self._ends[number] - self._begins[number])
    return _read(self._paths[number], self.dtype.name, count)


Tokens = np.ndarray | Shards
Stream = tuple[Tokens, np.ndarray]  # tokens, and where each text begins


def shard_path(folder: pathlib.Path, split: str, number: int) -> pathlib.Path:
  """The file with a split's tokens of one piece of the documents."""
  return folder / f'{split}.{number:05}.tokens'


def read_tokens(folder: pathlib.Path, split: str) -> Stream:
  """The split's tokens [N] and document starts int64 [D], memory-mapped.

  Tokens of documents that were written in pieces are `Shards`.

  Raises:
    ValueError: A file has another size than was written.
  """
  about = read_about(folder)
  counts = about['splits'][split]
  if 'shards' in about:
    sizes = {i: n for i, n in enumerate(about['shards'][split]) if n}
    paths = [shard_path(folder, split, i) for i in sizes]
    starts = _read(folder / f'{split}.starts', 'int64', counts['documents'])
    return Shards(paths, about['dtype'], [*sizes.values()]), starts
  return _read_stream(
    folder / split, about['dtype'], counts['tokens'], counts['documents']
  )


def read_pairs(folder: pathlib.Path, split: str) -> tuple[Stream, Stream]:
  """The streams of inputs and of targets, memory-mapped.

  Each stream is tokens [N] and the starts of P texts, int64 [P].

  Raises:
    ValueError: A file has another size than was written.
  """
  about = read_about(folder)
  counts = about['splits'][split]
  dtype, texts = about['dtype'], counts['pairs']
  inputs, targets = folder / f'{split}.inputs', folder / f'{split}.targets'
  return (
    _read_stream(inputs, dtype, counts['input_tokens'], texts),
    _read_stream(targets, dtype, counts['target_tokens'], texts),
  )


def read_about(folder: pathlib.Path) -> dict[str, Any]:
  """The dtype, the sha256, and the counts of each split, from `about.json`."""
  path = folder / 'about.json'
  return parse_json(read_text(path), path)


def finish(
  folder: pathlib.Path, about: dict[str, Any], digest: Any, tokenizer: Tokenizer
) -> None:
  """Writes the tokenizer, and `about` with the digest to `about.json`."""
  about['sha256'] = digest.hexdigest()
  tokenizer.save(folder / 'tokenizer.json')
  (folder / 'about.json').write_text(json.dumps(about, indent=1) + '\n')


def _read_stream(path, dtype, tokens, texts) -> Stream:
  return (
    _read(pathlib.Path(f'{path}.tokens'), dtype, tokens),
    _read(pathlib.Path(f'{path}.starts'), 'int64', texts),
  )


def _read(path: pathlib.Path, dtype: str, count: int) -> np.ndarray:
  size = np.dtype(dtype).itemsize * count
  if not path.is_file() or path.stat().st_size != size:
    raise InputError(
      f'{path} is missing or not of its {size} bytes; delete {path.parent}, '
      'and it is made anew'
    )
  # A plain array over the map, as indexing a np.memmap gives memmaps.
  return np.asarray(np.memmap(path, dtype, mode='r', shape=(count,)))


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
  """Writes the two files of a stream, tokens and starts, text by text.

  Attributes:
    texts: Number of texts so far.
    tokens: Number of tokens so far.
  """

  def __init__(self, path: pathlib.Path | str, tokenizer: Tokenizer):
    self._dtype = dtype_of(tokenizer)
    self._vocab_size = tokenizer.vocab_size
    self._out = open(f'{path}.tokens', 'wb')  # noqa: SIM115 - closed below
    self._out_starts = open(f'{path}.starts', 'wb')  # noqa: SIM115
    self.tokens = self.texts = 0

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._out.close()
    self._out_starts.close()

  def add(self, ids: np.ndarray) -> None:
    """Adds the ids of a text.

    Raises:
      ValueError: An id is not in the vocabulary.
    """
    # Values that the file's type cannot hold would become ids of other tokens.
    size = self._vocab_size
    if ids.dtype.kind not in 'iu' or not 0 <= ids.min() <= ids.max() < size:
      raise InputError(
        f'the tokenizer gave ids from {ids.min()} to {ids.max()} of type '
        f'{ids.dtype}, not integers in [0, vocab_size={size})'
      )
    self._out_starts.write(np.int64(self.tokens).tobytes())
    self.texts += 1
    self.tokens += ids.size
    self._out.write(ids.astype(self._dtype).tobytes())


class DocumentWriter(StreamWriter):
  """Writes the files of a stream of documents, each with an EOS at its end.

  No EOS is added if the tokenizer has none. Documents without a token are left
  out, but belong to the digest. The path has no suffix.
  """

  def __init__(
    self, path: pathlib.Path | str, tokenizer: Tokenizer, digest: Digest
  ):
    super().__init__(path, tokenizer)
    self._tokenizer, self._digest, self._bytes = tokenizer, digest, 0
    self._eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

  def write(self, text: Any) -> None:
    """Adds a document.

    Raises:
      ValueError: `text` is no text, or an id is not in the vocabulary.
    """
    encoded = utf8(text)
    self._digest.text(encoded)
    self._bytes += len(encoded)
    ids = self._tokenizer.encode(text)
    if ids.size:
      self.add(np.append(ids, np.array(self._eos, ids.dtype)))

  def counts(self) -> dict[str, int]:
    """The numbers of documents, of bytes of UTF-8 and of tokens so far."""
    numbers = self.texts, self._bytes, self.tokens
    return dict(zip(('documents', 'bytes', 'tokens'), numbers))


def dtype_of(tokenizer: Tokenizer) -> str:
  """The name of the smallest numpy type that holds all ids."""
  return np.min_scalar_type(tokenizer.vocab_size - 1).name


def utf8(text: Any) -> bytes:
  """The text in UTF-8.

  Raises:
    ValueError: `text` is no text, or has a half of a character.
  """
  if not isinstance(text, str):
    raise InputError(f'the source gave {text!r:.80}, which is no text')
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise InputError(f'the source gave {text!r:.80}: {error}') from None
