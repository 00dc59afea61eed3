"""Token streams on disk: written once, streaming; read by memory map.

Not here: what the texts are (`sources.py`) and how rows are cut
(`packing.py`).
"""

import array
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moe_jax.data.tokenizers import Tokenizer

FORMAT = 1  # of the folder's files; part of the key of every folder


def cache_root(cache_dir: str = '') -> pathlib.Path:
  """`cache_dir`, else $MOE_JAX_CACHE, else ~/.cache/moe_jax."""
  root = cache_dir or os.environ.get('MOE_JAX_CACHE') or '~/.cache/moe_jax'
  return pathlib.Path(root).expanduser()


def prepared(
  folder: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> pathlib.Path:
  """`folder`, filled by `write` unless it is there already.

  `write` fills a temporary folder beside it, which is then renamed: a folder
  under its own name is whole. Of two processes that prepare it at once, one
  wins and the other takes the winner's.
  """
  if folder.is_dir():
    return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    prefix=f'.{folder.name}-', dir=folder.parent
  ) as temporary:
    # One level down, since the temporary folder is closed to other users.
    unfinished = pathlib.Path(temporary) / folder.name
    unfinished.mkdir()
    write(unfinished)
    try:
      unfinished.rename(folder)
    except OSError:
      if not folder.is_dir():
        raise
  return folder


class Digest:
  """The sha256 of texts, split by split, each preceded by its length."""

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
  splits: dict[str, Iterable[str]],
  tokenizer: Tokenizer,
) -> None:
  """Tokenizes the texts of `splits`, one at a time, into `folder`.

  Documents without a token are left out; every other ends in the EOS where
  the tokenizer has one.

  Raises:
    ValueError: A split has fewer than the two tokens of one prediction.
  """
  digest = Digest()
  about: dict[str, Any] = {
    'dtype': np.min_scalar_type(tokenizer.vocab_size - 1).name,
    'splits': {},
  }
  for name, texts in splits.items():
    digest.split(name)
    counts = _write_split(
      folder / name, texts, tokenizer, about['dtype'], digest
    )
    if counts['tokens'] < 2:
      raise ValueError(
        f'split {name!r} has {counts["tokens"]} tokens in '
        f'{counts["documents"]} documents; training needs at least 2'
      )
    about['splits'][name] = counts
  about['sha256'] = digest.hexdigest()
  tokenizer.save(folder / 'tokenizer.json')
  (folder / 'about.json').write_text(json.dumps(about, indent=1) + '\n')


def read_tokens(
  folder: pathlib.Path, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """The split's tokens [N] and document starts int64 [D], memory-mapped.

  Raises:
    ValueError: A file has another size than was written.
  """
  about = read_about(folder)
  counts = about['splits'][split]
  tokens = _read(folder / f'{split}.tokens', about['dtype'], counts['tokens'])
  starts = _read(folder / f'{split}.starts', 'int64', counts['documents'])
  return tokens, starts


def read_about(folder: pathlib.Path) -> dict[str, Any]:
  """What `write_tokens` noted: dtype, sha256, and counts of each split."""
  return json.loads((folder / 'about.json').read_text())


def _write_split(path, texts, tokenizer, dtype, digest) -> dict[str, int]:
  starts = array.array('q')
  tokens = bytes_ = 0
  eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  with open(f'{path}.tokens', 'wb') as out:
    for text in texts:
      encoded = text.encode()
      digest.text(encoded)
      bytes_ += len(encoded)
      ids = tokenizer.encode(text)
      if ids.size:
        starts.append(tokens)
        tokens += ids.size + len(eos)
        out.write(np.append(ids, eos).astype(dtype).tobytes())
  with open(f'{path}.starts', 'wb') as out:
    starts.tofile(out)
  return {'documents': len(starts), 'bytes': bytes_, 'tokens': tokens}


def _read(path: pathlib.Path, dtype: str, count: int) -> np.ndarray:
  size = np.dtype(dtype).itemsize * count
  if not path.is_file() or path.stat().st_size != size:
    raise ValueError(
      f'{path} is missing or not of its {size} bytes; delete {path.parent}, '
      'and it is made anew'
    )
  # A plain array over the map: indexing a np.memmap makes memmaps again.
  return np.asarray(np.memmap(path, dtype, mode='r', shape=(count,)))
