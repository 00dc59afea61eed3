"""One tokenizer for all sources of a mixture."""

import hashlib
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any, cast

from moe_jax.data.cache_folders import FORMAT, cache_root, prepared
from moe_jax.data.sources.contract import SPLITS, Selection, SourceOptions
from moe_jax.data.tasks.contract import TaskOptions
from moe_jax.data.tokenizers import Fitted, TokenizerOptions, load

_FILE = 'tokenizer.json'


def shared_tokenizer(
  sources: Mapping[str, SourceOptions],
  task: TaskOptions,
  tokenizer: TokenizerOptions,
  selection: Selection,
) -> TokenizerOptions:
  """The tokenizer of all sources, fitted to their texts if it depends on them.

  One that is fitted is kept in the cache, by its options and the texts.

  Raises:
    ValueError: The data of a source is missing or bad.
    NotPreparedError: The texts would have to be read within `reading_only`.
  """
  if tokenizer.known_vocab_size() is not None:
    return tokenizer
  corpora = [
    cast(Any, task).open(source, selection)
    for _, source in sorted(sources.items())
  ]

  def write(folder: pathlib.Path) -> None:
    texts = itertools.chain.from_iterable(
      corpus.texts(split) for corpus in corpora for split in SPLITS
    )
    tokenizer.fit(texts).save(folder / _FILE)

  identities = [corpus.identity for corpus in corpora]
  key = f'{FORMAT} {identities} {tokenizer.identity()}'
  name = hashlib.sha256(key.encode()).hexdigest()[:32]
  folder = cache_root(selection.cache_dir) / 'tokenizers' / name
  return Fitted(load(prepared(folder, write) / _FILE))
