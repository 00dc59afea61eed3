"""The folder of tokens that is made of finished pieces."""

import hashlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np

from moe_jax.data import store
from moe_jax.data.cache_folders import locked, new_folder, publish
from moe_jax.data.piece_workers import Work, piece_facts
from moe_jax.data.sources.contract import SPLITS
from moe_jax.data.store import dtype_of
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError

_BLOCK = 2**20  # starts of documents that are in memory at once


def join(
  work: Work, folder: pathlib.Path, tokenizer: Tokenizer
) -> tuple[int, ...]:
  """Joins the pieces into the folder, unless it exists or a piece is missing.

  Returns:
    The numbers of missing pieces, in which case there is no folder yet.

  Raises:
    ValueError: A piece was damaged, or a split has less than two tokens.
  """
  count = len(work.pieces.sizes)
  missing = [i for i in range(count) if not work.path(i).is_dir()]
  if missing:
    return tuple(missing)
  with locked(work.folder / 'whole'):
    if not folder.is_dir():
      facts = []
      for number in range(count):
        fact = piece_facts(work, number, digests=False)
        if fact is None:
          shutil.rmtree(work.path(number))
          raise InputError(
            f'{work.path(number)} was damaged and is removed; the same command '
            'makes it anew'
          )
        facts.append(fact)
      with new_folder(work.folder, 'whole') as unfinished:
        token_files = _join(work, unfinished, tokenizer, facts)
        publish(unfinished, folder, token_files)
  return ()


def _join(
  work: Work,
  unfinished: pathlib.Path,
  tokenizer: Tokenizer,
  facts: list[dict[str, Any]],
) -> dict[str, list]:
  """Fills one folder from all pieces: token files are linked, starts joined.

  Returns:
    Size and sha256 of the token files by name.
  """
  token_files, shards, splits, sha256 = {}, {}, {}, hashlib.sha256()
  for split in SPLITS:
    counts = [fact['splits'][split] for fact in facts]
    splits[split] = {
      key: sum(piece[key] for piece in counts)
      for key in ('documents', 'bytes', 'tokens')
    }
    store.check_tokens(split, splits[split])
    shards[split] = [piece['tokens'] for piece in counts]
    for number, piece_counts in enumerate(counts):
      sha256.update(f'{split} {number} {piece_counts["sha256"]}\n'.encode())
      if piece_counts['tokens']:
        path = store.shard_path(unfinished, split, number)
        link(work.path(number) / f'{split}.tokens', path)
        token_files[path.name] = facts[number]['files'][f'{split}.tokens']
    _join_starts(work, split, shards[split], unfinished / f'{split}.starts')
  about = {
    'dtype': dtype_of(tokenizer),
    'splits': splits,
    'shards': shards,
    'sha256': sha256.hexdigest(),
  }
  tokenizer.save(unfinished / 'tokenizer.json')
  text = json.dumps(about, indent=1) + '\n'
  (unfinished / 'about.json').write_text(text, encoding='utf-8')
  return token_files


def link(source: pathlib.Path, target: pathlib.Path) -> None:
  """Gives a file a second name, or a copy where there are no links."""
  try:
    target.hardlink_to(source)
  except OSError:
    shutil.copyfile(source, target)


def _join_starts(
  work: Work, split: str, tokens: list[int], path: pathlib.Path
) -> None:
  """Writes where every document begins in the stream of all pieces."""
  tokens_before = 0
  with path.open('wb') as out:
    for number, count in enumerate(tokens):
      with (work.path(number) / f'{split}.starts').open('rb') as file:
        while len(starts := np.fromfile(file, np.int64, _BLOCK)):
          out.write((starts + tokens_before).tobytes())
      tokens_before += count
