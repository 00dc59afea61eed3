"""Token streams on disk: written piece by piece, read as memory maps.

A folder of tokens has a folder for each piece of a source, `00000`, `00001`,
..., and beside them what all pieces have in common:

    00000/train.documents.tokens    tokens of the piece, one text after another
    00000/train.documents.lengths   the number of tokens of each text, uint32
    00000/piece.json                counts, and the sha256 of the texts
    train.documents.starts          where each text of all pieces begins, int64
    about.json                      counts of all pieces, type of the tokens
    tokenizer/tokenizer.json        the tokenizer

Texts have one stream for each split, `documents`; pairs have two, `inputs` and
`targets`.
"""

import collections
import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax.data.plain_files import parse_json, read_text
from moe_jax.data.tokenizers.contract import Tokenizer
from moe_jax.errors import InputError

SPLITS: tuple[str, str] = ('train', 'validation')
DOCUMENTS, PAIRS = ('documents',), ('inputs', 'targets')  # names of streams
TOKENIZER = 'tokenizer/tokenizer.json'
# Name of the number of tokens of a stream among the counts of a split.
_TOKENS = {
  'documents': 'tokens',
  'inputs': 'input_tokens',
  'targets': 'target_tokens',
}
# Memory maps that a process holds open, each with a file descriptor.
_MOST_OPEN = 256


def piece_name(number: int) -> str:
  """The name of the folder of the piece with this index."""
  return f'{number:05}'


def write_piece(
  folder: pathlib.Path,
  texts: Iterable[tuple[str, Sequence[Any]]],
  tokenizer: Tokenizer,
  streams: Sequence[str],
) -> None:
  """Tokenizes the texts of a piece, one at a time, into `folder`.

  Documents without a token, and pairs with a side without tokens, are left out,
  but belong to the digest. Documents end in the EOS, if the tokenizer has one;
  sides of pairs do not, so that they can be cut first.

  Args:
    folder: An empty folder.
    texts: The split of each document or pair, and its texts.
    tokenizer: The tokenizer.
    streams: DOCUMENTS or PAIRS, the stream of each of the texts.

  Raises:
    ValueError: A text is no text, or an id is not in the vocabulary.
  """
  eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  dtype, digest = dtype_of(tokenizer), Digest()
  counts = {split: collections.Counter() for split in SPLITS}
  split_before = ''
  with contextlib.ExitStack() as stack:

    def opened(name: str):
      return stack.enter_context((folder / name).open('wb'))

    files = {
      (split, stream): [
        opened(f'{split}.{stream}.tokens'),
        opened(f'{split}.{stream}.lengths'),
      ]
      for split in SPLITS
      for stream in streams
    }
    for split, sides in texts:
      if split != split_before:
        digest.split(split)
        split_before = split
      for text in sides:
        encoded = utf8(text)
        digest.text(encoded)
        counts[split]['bytes'] += len(encoded)
      ids = [_checked(tokenizer.encode(text), tokenizer) for text in sides]
      if not all(side.size for side in ids):
        continue
      counts[split]['texts'] += 1
      for stream, side in zip(streams, ids):
        if streams == DOCUMENTS:
          side = np.append(side, np.array(eos, side.dtype))
        tokens, lengths = files[split, stream]
        tokens.write(side.astype(dtype).tobytes())
        lengths.write(np.uint32(side.size).tobytes())
        counts[split][stream] += side.size
  piece = {'splits': counts, 'sha256': digest.hexdigest()}
  (folder / 'piece.json').write_text(json.dumps(piece), encoding='utf-8')


def join(
  folder: pathlib.Path,
  num_pieces: int,
  tokenizer: Tokenizer,
  streams: Sequence[str],
) -> None:
  """Writes what the pieces in a folder have in common.

  Raises:
    ValueError: A split has fewer than the two tokens of one prediction, or no
      pair.
  """
  folders = [folder / piece_name(number) for number in range(num_pieces)]
  pieces = [_read_json(path / 'piece.json') for path in folders]
  splits, sizes = {}, {}
  for split in SPLITS:
    total = collections.Counter()
    for piece in pieces:
      total.update(piece['splits'][split])
    entry = 'documents' if streams == DOCUMENTS else 'pairs'
    splits[split] = {entry: total['texts'], 'bytes': total['bytes']}
    for stream in streams:
      name = f'{split}.{stream}'
      splits[split][_TOKENS[stream]] = total[stream]
      sizes[name] = [piece['splits'][split].get(stream, 0) for piece in pieces]
      with (folder / f'{name}.starts').open('wb') as out:
        begins = np.cumsum([0, *sizes[name]])
        for path, begin in zip(folders, begins):
          lengths = np.fromfile(path / f'{name}.lengths', np.uint32)
          ends = begin + np.cumsum(lengths, dtype=np.int64)
          out.write((ends - lengths).tobytes())
    if streams == DOCUMENTS and total['documents'] < 2:
      raise InputError(
        f'split {split!r} has {total["documents"]} tokens in '
        f'{total["texts"]} documents; training needs at least 2'
      )
    if not total['texts']:
      raise InputError(
        f'split {split!r} has no pair of which both sides have a token'
      )
  digest = pieces[0]['sha256']
  if num_pieces > 1:
    lines = ''.join(f'{piece["sha256"]}\n' for piece in pieces)
    digest = hashlib.sha256(lines.encode()).hexdigest()
  about = {
    'dtype': dtype_of(tokenizer),
    'splits': splits,
    'tokens_of_pieces': sizes,
    'sha256': digest,
  }
  (folder / 'about.json').write_text(json.dumps(about, indent=1) + '\n')


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
      index = np.arange(begin, end)
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

  def _map(self, number: int) -> np.ndarray:
    count = int(self._ends[number] - self._begins[number])
    return _read(self._paths[number], self.dtype.name, count)


Tokens = np.ndarray | Shards
Stream = tuple[Tokens, np.ndarray]  # tokens, and where each text begins


def read_stream(folder: pathlib.Path, split: str, stream: str) -> Stream:
  """The tokens [N] of a stream and the starts int64 [D] of its texts, mapped.

  The tokens of several pieces are `Shards`.

  Raises:
    ValueError: A file has another size than was written.
  """
  about, name = read_about(folder), f'{split}.{stream}'
  sizes = about['tokens_of_pieces'][name]
  paths = {
    folder / piece_name(number) / f'{name}.tokens': size
    for number, size in enumerate(sizes)
    if size
  }
  if len(paths) == 1:
    ((path, size),) = paths.items()
    tokens = _read(path, about['dtype'], size)
  else:
    tokens = Shards([*paths], about['dtype'], [*paths.values()])
  counts = about['splits'][split]
  texts = counts.get('documents', counts.get('pairs'))
  return tokens, _read(folder / f'{name}.starts', 'int64', texts)


def read_about(folder: pathlib.Path) -> dict[str, Any]:
  """The dtype, the sha256, and the counts of each split, from `about.json`."""
  return _read_json(folder / 'about.json')


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  return parse_json(read_text(path), path)


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


def _checked(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """The ids of a text, unless the file's type would make others of them."""
  size = tokenizer.vocab_size
  if ids.size and (
    ids.dtype.kind not in 'iu' or not 0 <= ids.min() <= ids.max() < size
  ):
    raise InputError(
      f'the tokenizer gave ids from {ids.min()} to {ids.max()} of type '
      f'{ids.dtype}, not integers in [0, vocab_size={size})'
    )
  return ids


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
