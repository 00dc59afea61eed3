"""Token streams on disk: written text by text, read as memory maps.

A split of documents is one stream; a split of pairs is two.

Not here: the texts (`moe_jax.data.sources`), the folders of streams
(`cache_folders.py`), and how rows are cut (`packing.py`).
"""

import array
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moe_jax.data.plain_files import parse_json, read_text
from moe_jax.data.tokenizers.contract import Tokenizer


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
    """64 hexadecimal digits."""
    return self._sha256.hexdigest()


def write_tokens(
  folder: pathlib.Path,
  splits: Mapping[str, Iterable[str]],
  tokenizer: Tokenizer,
) -> None:
  """Tokenizes the texts of `splits`, one at a time, into `folder`.

  Documents without a token are left out. All others end in the EOS, if the
  tokenizer has one.

  Raises:
    ValueError: A split has fewer than the two tokens of one prediction.
  """
  digest = Digest()
  about = _about(tokenizer)
  for name, texts in splits.items():
    digest.split(name)
    counts = _write_split(folder / name, texts, tokenizer, digest)
    if counts['tokens'] < 2:
      raise ValueError(
        f'split {name!r} has {counts["tokens"]} tokens in '
        f'{counts["documents"]} documents; training needs at least 2'
      )
    about['splits'][name] = counts
  _finish(folder, about, digest, tokenizer)


def write_pairs(
  folder: pathlib.Path,
  splits: Mapping[str, Iterable[tuple[str, str]]],
  tokenizer: Tokenizer,
) -> None:
  """Tokenizes (inputs, targets) of `splits`, one at a time, into `folder`.

  Pairs with a side without tokens are left out. No EOS is added, so that a
  text can be cut before that.

  Raises:
    ValueError: A split has no pair.
  """
  digest = Digest()
  about = _about(tokenizer)
  for name, pairs in splits.items():
    digest.split(name)
    counts = _write_pairs(folder / name, pairs, tokenizer, digest)
    if not counts['pairs']:
      raise ValueError(
        f'split {name!r} has no pair of which both sides have a token'
      )
    about['splits'][name] = counts
  _finish(folder, about, digest, tokenizer)


Stream = tuple[np.ndarray, np.ndarray]


def read_tokens(folder: pathlib.Path, split: str) -> Stream:
  """The split's tokens [N] and document starts int64 [D], memory-mapped.

  Raises:
    ValueError: A file has another size than was written.
  """
  about = read_about(folder)
  counts = about['splits'][split]
  return _read_stream(
    folder / split, about['dtype'], counts['tokens'], counts['documents']
  )


def read_pairs(folder: pathlib.Path, split: str) -> tuple[Stream, Stream]:
  """The streams of inputs and of targets, memory-mapped.

  Each is tokens [N] and starts int64 [P].

  Raises:
    ValueError: A file has another size than was written.
  """
  about = read_about(folder)
  counts = about['splits'][split]
  inputs, targets = (
    _read_stream(
      folder / f'{split}.{side}s',
      about['dtype'],
      counts[f'{side}_tokens'],
      counts['pairs'],
    )
    for side in ('input', 'target')
  )
  return inputs, targets


def read_about(folder: pathlib.Path) -> dict[str, Any]:
  """The dtype, the sha256, and the counts of each split, as written."""
  path = folder / 'about.json'
  return parse_json(read_text(path), path)


class _Stream:
  """Token files that grow by one text at a time."""

  def __init__(self, path: pathlib.Path | str, tokenizer: Tokenizer):
    self._path, self._dtype = path, _dtype(tokenizer)
    self._vocab_size = tokenizer.vocab_size
    self._starts = array.array('q')
    self._out = open(f'{path}.tokens', 'wb')  # noqa: SIM115 - closed below
    self.tokens = 0

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._out.close()
    with open(f'{self._path}.starts', 'wb') as out:
      self._starts.tofile(out)

  def __len__(self) -> int:
    return len(self._starts)

  def add(self, ids: np.ndarray) -> None:
    # Values that the file's type cannot hold would become ids of other tokens.
    if ids.dtype.kind not in 'iu' or not 0 <= ids.min() <= ids.max() < (
      self._vocab_size
    ):
      raise ValueError(
        f'the tokenizer gave ids from {ids.min()} to {ids.max()} of type '
        f'{ids.dtype}, not integers in [0, vocab_size={self._vocab_size})'
      )
    self._starts.append(self.tokens)
    self.tokens += ids.size
    self._out.write(ids.astype(self._dtype).tobytes())


def _write_split(path, texts, tokenizer, digest) -> dict[str, int]:
  bytes_ = 0
  eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  with _Stream(path, tokenizer) as stream:
    for text in texts:
      encoded = _utf8(text)
      digest.text(encoded)
      bytes_ += len(encoded)
      ids = tokenizer.encode(text)
      if ids.size:
        stream.add(np.append(ids, np.array(eos, ids.dtype)))
    return {
      'documents': len(stream), 'bytes': bytes_, 'tokens': stream.tokens
    }  # fmt: skip


def _write_pairs(path, pairs, tokenizer, digest) -> dict[str, int]:
  bytes_ = 0
  with (
    _Stream(f'{path}.inputs', tokenizer) as inputs,
    _Stream(f'{path}.targets', tokenizer) as targets,
  ):
    for pair in pairs:
      for text in pair:
        encoded = _utf8(text)
        digest.text(encoded)
        bytes_ += len(encoded)
      ids = [tokenizer.encode(text) for text in pair]
      if all(side.size for side in ids):
        inputs.add(ids[0])
        targets.add(ids[1])
    return {
      'pairs': len(inputs),
      'bytes': bytes_,
      'input_tokens': inputs.tokens,
      'target_tokens': targets.tokens,
    }


def _utf8(text: str) -> bytes:
  if not isinstance(text, str):
    raise ValueError(f'the source gave {text!r:.80}, which is no text')
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'the source gave {text!r:.80}: {error}') from None


def _about(tokenizer: Tokenizer) -> dict[str, Any]:
  return {'dtype': _dtype(tokenizer), 'splits': {}}


def _dtype(tokenizer: Tokenizer) -> str:
  """The smallest type that holds all ids."""
  return np.min_scalar_type(tokenizer.vocab_size - 1).name


def _finish(folder, about, digest, tokenizer) -> None:
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
    raise ValueError(
      f'{path} is missing or not of its {size} bytes; delete {path.parent}, '
      'and it is made anew'
    )
  # A plain array over the map, as indexing a np.memmap gives memmaps.
  return np.asarray(np.memmap(path, dtype, mode='r', shape=(count,)))
