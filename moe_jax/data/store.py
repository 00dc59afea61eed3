"""Token streams on disk: written in pieces, joined, read as memory maps.

    00000/train.documents.tokens    a piece: its tokens, one text after another
    00000/train.documents.lengths   the number of tokens of each text, uint32
    00000/piece.json                counts, and the sha256 of the texts

    train.documents.tokens          all pieces: their tokens
    train.documents.starts          where each text begins, int64
    about.json                      counts, type of the tokens, sha256
    tokenizer.json

Texts have one stream for each split, `documents`; pairs have two, `inputs` and
`targets`.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax.data.contracts import DOCUMENTS, SPLITS, Tokenizer
from moe_jax.data.plain_files import encoded, parse_json, read_text
from moe_jax.errors import InputError

# The key of each stream's number of tokens among the counts of a split.
_TOKENS = dict(
  documents='tokens', inputs='input_tokens', targets='target_tokens'
)
_BATCH_BYTES = 2**20  # of UTF-8 of a split, which are tokenized together
Stream = tuple[np.ndarray, np.ndarray]  # tokens, and where each text begins


def write_piece(
  folder: pathlib.Path,
  texts: Iterable[tuple[str, Sequence[Any]]],
  tokenizer: Tokenizer,
  streams: Sequence[str],
) -> None:
  """Tokenizes the texts of a piece into `folder`, about a MiB at a time.

  Documents without a token, and pairs with a side without tokens, are left out
  of the streams, but their texts belong to the digest. Documents end in the
  EOS, if the tokenizer has one. The sides of pairs do not, so that a task can
  cut them before it adds the EOS.

  Args:
    folder: An empty folder.
    texts: The split of each document or pair, and its texts.
    tokenizer: The tokenizer.
    streams: The names DOCUMENTS or PAIRS: the stream of the text of a document,
      or of each of the two texts of a pair.

  Raises:
    ValueError: A text is no text, or an id is not in the vocabulary.
  """
  dtype, digest, split_before = _dtype(tokenizer), Digest(), ''
  counts = {split: collections.Counter() for split in SPLITS}
  waiting = {split: [] for split in SPLITS}  # texts that have no tokens yet

  def write(split: str) -> None:
    ids = [tokenizer.encode_batch(side) for side in zip(*waiting[split])]
    kept = [sides for sides in zip(*ids) if all(side.size for side in sides)]
    waiting[split].clear()
    if kept:
      counts[split]['texts'] += len(kept)
    for stream, side in zip(streams, zip(*kept)):
      tokens = _checked(np.concatenate(side), tokenizer).astype(dtype)
      lengths = np.array([len(ids) for ids in side])
      if streams == DOCUMENTS and tokenizer.eos_id is not None:
        tokens = np.insert(tokens, lengths.cumsum(), tokenizer.eos_id)
        lengths += 1
      files[split, stream, 'tokens'].write(tokens.tobytes())
      files[split, stream, 'lengths'].write(lengths.astype('uint32').tobytes())
      counts[split][stream] += tokens.size

  with contextlib.ExitStack() as stack:
    files = {
      names: stack.enter_context((folder / '.'.join(names)).open('wb'))
      for names in itertools.product(SPLITS, streams, ('tokens', 'lengths'))
    }
    for split, sides in texts:
      if split != split_before:
        digest.split(split)
        split_before = split
      number = counts[split]['bytes'] // _BATCH_BYTES
      for text in sides:
        content = encoded(text, 'text of the source')
        digest.text(content)
        counts[split]['bytes'] += len(content)
      waiting[split].append(sides)
      if counts[split]['bytes'] // _BATCH_BYTES > number:
        write(split)
    for split in SPLITS:
      write(split)
  piece = {'splits': counts, 'sha256': digest.hexdigest()}
  (folder / 'piece.json').write_text(json.dumps(piece), encoding='utf-8')


def join(
  pieces: Sequence[pathlib.Path],
  folder: pathlib.Path,
  tokenizer: Tokenizer,
  streams: Sequence[str],
) -> None:
  """Writes the tokens of all pieces, in order, and the tokenizer to `folder`.

  `pieces` are folders that `write_piece` has filled with these `streams`.

  Raises:
    ValueError: A split has fewer than the two tokens of one prediction, or no
      pair of which both sides have a token.
  """
  facts, splits = [_read_json(piece / 'piece.json') for piece in pieces], {}
  for split in SPLITS:
    total = collections.Counter()
    for fact in facts:
      total.update(fact['splits'][split])
    entry = 'documents' if streams == DOCUMENTS else 'pairs'
    splits[split] = {entry: total['texts'], 'bytes': total['bytes']}
    for stream in streams:
      splits[split][_TOKENS[stream]] = total[stream]
      _join_stream(pieces, folder, f'{split}.{stream}')
    count, least = total[streams[0]], 2 if streams == DOCUMENTS else 1
    if count < least:
      raise InputError(
        f'split {split!r} has {count} tokens in {total["texts"]} {entry}, and '
        f'training needs at least {least}: give the source more files, lines '
        'or modules (about one text in 20 is for validation, and pairs with an '
        'empty side do not count)'
      )
  digest = facts[0]['sha256']
  if len(facts) > 1:
    lines = ''.join(f'{fact["sha256"]}\n' for fact in facts)
    digest = hashlib.sha256(lines.encode()).hexdigest()
  about = {'dtype': _dtype(tokenizer), 'splits': splits, 'sha256': digest}
  (folder / 'about.json').write_text(json.dumps(about, indent=1) + '\n')
  tokenizer.save(folder / 'tokenizer.json')


def _join_stream(pieces, folder, name) -> None:
  begin = 0
  with (
    (folder / f'{name}.tokens').open('wb') as tokens,
    (folder / f'{name}.starts').open('wb') as starts,
  ):
    for piece in pieces:
      with (piece / f'{name}.tokens').open('rb') as part:
        shutil.copyfileobj(part, tokens, 2**20)
      lengths = np.fromfile(piece / f'{name}.lengths', np.uint32)
      ends = begin + np.cumsum(lengths, dtype=np.int64)
      starts.write((ends - lengths).tobytes())
      begin = ends[-1] if ends.size else begin


def read(folder: pathlib.Path, split: str, streams: Sequence[str]) -> Any:
  """Memory maps of a split's tokens [N] and of its D texts' starts, int64 [D].

  `streams` is DOCUMENTS or PAIRS; for pairs the result is a tuple of two such
  streams (tokens, starts), of inputs and of targets.
  """
  dtypes = {'tokens': read_about(folder)['dtype'], 'starts': 'int64'}
  read_streams = tuple(
    tuple(
      # A plain array over the mapped file, as indexing a memmap gives memmaps.
      np.asarray(np.memmap(f'{folder}/{split}.{stream}.{name}', dtype, 'r'))
      for name, dtype in dtypes.items()
    )
    for stream in streams
  )
  return read_streams[0] if streams == DOCUMENTS else read_streams


def read_about(folder: pathlib.Path) -> dict[str, Any]:
  """The object in `about.json`: 'dtype' (of tokens), 'sha256' and 'splits'.

  'splits' has, for each split by name, the numbers of its documents or pairs,
  of their bytes, and of the tokens of each stream.
  """
  return _read_json(folder / 'about.json')


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  return parse_json(read_text(path), path)


class Digest:
  """The sha256 of the texts of all splits, each text preceded by its length."""

  def __init__(self):
    self._sha256 = hashlib.sha256()

  def split(self, name: str) -> None:
    """Begins the split `name`; the texts that are added next belong to it."""
    self._sha256.update(f'split {name}\n'.encode())

  def text(self, content: bytes) -> None:
    """Adds a document, or one side of a pair, in UTF-8."""
    self._sha256.update(f'text {len(content)}\n'.encode() + content)

  def hexdigest(self) -> str:
    """The digest in 64 hexadecimal digits."""
    return self._sha256.hexdigest()


def _checked(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """Returns the ids unchanged if all are in the tokenizer's vocabulary.

  Raises:
    ValueError: The ids are not integers in [0, vocab_size).
  """
  size, is_integer = tokenizer.vocab_size, ids.dtype.kind in 'iu'
  if ids.size and not (is_integer and 0 <= ids.min() <= ids.max() < size):
    raise InputError(
      f'the tokenizer gave ids from {ids.min()} to {ids.max()} of type '
      f'{ids.dtype}, not integers in [0, vocab_size={size})'
    )
  return ids


def _dtype(tokenizer: Tokenizer) -> str:
  """The name of the smallest numpy type that holds all ids of a tokenizer."""
  return np.min_scalar_type(tokenizer.vocab_size - 1).name
