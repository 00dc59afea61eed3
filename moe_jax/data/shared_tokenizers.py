"""One tokenizer for all sources of a mixture."""

import itertools
from collections.abc import Mapping
from typing import Any, cast

from moe_jax.data.read_only import check_may_prepare
from moe_jax.data.sources.contract import SPLITS, Selection, SourceOptions
from moe_jax.data.tasks.contract import TaskOptions
from moe_jax.data.tokenizers import Fitted, TokenizerOptions


def shared_tokenizer(
  sources: Mapping[str, SourceOptions],
  task: TaskOptions,
  tokenizer: TokenizerOptions,
  selection: Selection,
) -> TokenizerOptions:
  """The tokenizer of all sources, fitted to their texts if it depends on them.

  Raises:
    ValueError: The data of a source is missing or bad.
    NotPreparedError: The texts would have to be read within `reading_only`.
  """
  if not task.has_tokens or tokenizer.known_vocab_size() is not None:
    return tokenizer
  check_may_prepare('the tokenizer of the mixture')
  texts = itertools.chain.from_iterable(
    cast(Any, task).open(source, selection).texts(split)
    for _, source in sorted(sources.items())
    for split in SPLITS
  )
  return Fitted(tokenizer.fit(texts))
