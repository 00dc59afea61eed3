"""Token streams on disk: written text by text, read as memory maps.

A split of documents is one stream; a split of pairs is two.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moe_jax.data.plain_files import parse_json, read_text
from moe_jax.data.shards import Shards
from moe_jax.data.stream_writers import (
  Digest,
  DocumentWriter,
  StreamWriter,
  dtype_of,
  utf8,
)
from moe_jax.data.tokenizers.contract import Tokenizer
from moe_jax.errors import InputError


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
    with DocumentWriter(folder / name, tokenizer, digest) as stream:
      for text in texts:
        stream.write(text)
      about['splits'][name] = stream.counts()
    check_tokens(name, about['splits'][name])
  _finish(folder, about, digest, tokenizer)


def check_tokens(split: str, counts: Mapping[str, int]) -> None:
  """Raises ValueError where a split of documents has less than two tokens."""
  if counts['tokens'] < 2:
    raise InputError(
      f'split {split!r} has {counts["tokens"]} tokens in '
      f'{counts["documents"]} documents; training needs at least 2'
    )


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
      raise InputError(
        f'split {name!r} has no pair of which both sides have a token'
      )
    about['splits'][name] = counts
  _finish(folder, about, digest, tokenizer)


Stream = tuple[np.ndarray | Shards, np.ndarray]


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
    sizes = about['shards'][split]
    full = [i for i, size in enumerate(sizes) if size]
    return (
      Shards(
        [shard_path(folder, split, i) for i in full],
        about['dtype'],
        [sizes[i] for i in full],
      ),
      _read(folder / f'{split}.starts', 'int64', counts['documents']),
    )
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


def _write_pairs(path, pairs, tokenizer, digest) -> dict[str, int]:
  bytes_ = 0
  with (
    StreamWriter(f'{path}.inputs', tokenizer) as inputs,
    StreamWriter(f'{path}.targets', tokenizer) as targets,
  ):
    for pair in pairs:
      for text in pair:
        encoded = utf8(text)
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


def _about(tokenizer: Tokenizer) -> dict[str, Any]:
  return {'dtype': dtype_of(tokenizer), 'splits': {}}


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
    raise InputError(
      f'{path} is missing or not of its {size} bytes; delete {path.parent}, '
      'and it is made anew'
    )
  # A plain array over the map, as indexing a np.memmap gives memmaps.
  return np.asarray(np.memmap(path, dtype, mode='r', shape=(count,)))
