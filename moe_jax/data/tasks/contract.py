"""What a task is: it makes rows of batches from a source, to be learned.

Not here: the tasks, one a file, and batches (`moe_jax.data.pipeline`).
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

from moe_jax.data import store
from moe_jax.data.cache_folders import cache_root, prepared
from moe_jax.data.layouts import RowShape
from moe_jax.data.packing import Rows
from moe_jax.data.sources.contract import (
  SPLITS,
  Pair,
  Pairs,
  Selection,
  SourceOptions,
  Texts,
)
from moe_jax.data.tokenizers import Tokenizer, TokenizerOptions, load
from moe_jax.options import Options, required


class TaskOptions(Options):
  """Contract of a task: what it reads, and the dataset that it makes.

  Others ask these attributes and never for a task's name.

  Attributes:
    reads: Form in which it reads a source: 'texts', 'pairs' or 'classes'.
    label: Name of the task in what a run prints; '' is a language model's,
      which prints none.
    has_tokens: Whether its rows are tokens; False where they are arrays, read
      by models of features.
    makes_examples: Whether a row holds examples, each of inputs and targets.
      Only then may rows have an encoder's side or share their room.
    generates: Whether a model can generate its targets for inputs that can be
      read, so that they can be scored.
    answers_go_on: Whether a decoder sees targets as the text that follows the
      inputs, without a token in between.
  """

  reads: ClassVar[str]
  label: ClassVar[str]
  has_tokens: ClassVar[bool] = True
  makes_examples: ClassVar[bool] = True
  generates: ClassVar[bool] = False
  answers_go_on: ClassVar[bool] = False

  def problems_with(self, shape: RowShape) -> Iterator[str]:
    """What is wrong with these rows for this task, each text a problem."""
    del shape
    return iter(())

  @required
  def load(
    self,
    source: SourceOptions,
    tokenizer: TokenizerOptions,
    selection: Selection,
    shape: RowShape,
  ) -> 'Dataset':
    """The dataset, tokenized now unless it is in the cache.

    Raises:
      ValueError: The data is missing or bad, a split is empty, or a row is too
        short for the task.
    """
    raise NotImplementedError

  def pairs(
    self, source: SourceOptions, selection: Selection, split: str
  ) -> Iterator[Pair] | None:
    """The pairs of texts that a split's examples are made of, in order.

    None where the examples are no pairs of texts but pieces of them.
    """
    del source, selection, split
    return None


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A corpus as rows, and the task that is learned from it.

  Attributes:
    source: Description of the source for people.
    tokenizer: Tokenizer as fitted when the corpus was tokenized, with the ids
      that the task adds.
    splits: Rows of 'train' and of 'validation'.
    digest: The sha256 of both splits' texts, in order; results are comparable
      only where it is the same.
    counts: For each split its 'documents', 'bytes' (of UTF-8) and 'tokens'; of
      pairs 'pairs', 'bytes', 'input_tokens', 'target_tokens' (before any EOS)
      and 'truncated', the pairs that are too long for a row; of classes
      'examples'.
    task: Options of the task.
  """

  source: str
  tokenizer: Tokenizer
  splits: dict[str, Rows]
  digest: str
  counts: dict[str, dict[str, int]]
  task: TaskOptions

  @property
  def vocab_size(self) -> int:
    """V of a model of this data: ids are below it."""
    return self.tokenizer.vocab_size

  @property
  def feature_shape(self) -> tuple[int, ...]:
    """Shape of one example that is an array; () of tokens."""
    return self.tokenizer.feature_shape

  @property
  def counted(self) -> str:
    """What losses and speed are counted by: 'token' or 'example'."""
    return 'token' if self.task.has_tokens else 'example'

  @property
  def loss_unit(self) -> str:
    """The unit of a loss; of examples it is the model's own, often nats."""
    return 'nats/token' if self.task.has_tokens else f'per {self.counted}'

  def describe(self) -> str:
    """Lines to print at the start of a run: what is trained on, exactly."""
    counted = [
      f'{sum(counts[key] for counts in self.counts.values()):,} {key}'
      for key in ('documents', 'pairs', 'examples', 'bytes')
      if key in self.counts['train']
    ]
    lines = [f'data: {self.source}, {", ".join(counted)}, sha256 {self.digest}']
    if self.task.label:
      lines.append(f'task: {self.task.label}')
    lines.append(f'tokenizer: {self.tokenizer.identity}, V={self.vocab_size}')
    for split, rows in self.splits.items():
      counts = ', '.join(
        f'{count:,} {name.replace("_", " ")}'
        for name, count in self.counts[split].items()
      )
      lines.append(f'{split}: {counts}, {rows.describe()}')
    return '\n'.join(lines)


class TokenTask(TaskOptions):
  """A task on tokens: it says which ids it adds and how rows are cut.

  The cache is keyed by the source's content and the tokenizer; it holds whole
  streams, so lengths and tasks on the same texts may change freely.
  """

  def open(self, source: SourceOptions, selection: Selection) -> Texts | Pairs:
    """The source in the form that the task reads."""
    raise NotImplementedError

  def vocabulary(self, base: Tokenizer, shape: RowShape) -> Tokenizer:
    """The tokenizer with the ids that the task needs; here as it is."""
    del shape
    return base

  def rows(self, stream: Any, tokenizer: Tokenizer, shape: RowShape) -> Rows:
    """The rows of one split.

    Args:
      stream: Tokens of the split, as the form's `read` gives them.
      tokenizer: Tokenizer that `vocabulary` gave.
      shape: Lengths of the rows.
    """
    raise NotImplementedError

  def load(
    self,
    source: SourceOptions,
    tokenizer: TokenizerOptions,
    selection: Selection,
    shape: RowShape,
  ) -> Dataset:
    """See `TaskOptions.load`; tokens are memory-mapped."""
    corpus = self.open(source, selection)
    folder = _tokenized(corpus, tokenizer, selection.cache_dir)
    about = store.read_about(folder)
    vocabulary = self.vocabulary(load(folder / 'tokenizer.json'), shape)
    splits = {
      split: self.rows(corpus.read(folder, split), vocabulary, shape)
      for split in SPLITS
    }
    return Dataset(
      source=corpus.name,
      tokenizer=vocabulary,
      splits=splits,
      digest=about['sha256'],
      counts={
        split: {**about['splits'][split], **rows.counts()}
        for split, rows in splits.items()
      },
      task=self,
    )


class TextTask(TokenTask):
  """A task on the texts of a source; `rows` takes tokens and starts."""

  reads = 'texts'

  def open(self, source: SourceOptions, selection: Selection) -> Texts:
    """The documents."""
    return source.texts(selection)


class PairTask(TokenTask):
  """A task on pairs; `rows` takes tokens and starts of inputs and targets."""

  reads = 'pairs'

  def open(self, source: SourceOptions, selection: Selection) -> Pairs:
    """The pairs."""
    return source.pairs(selection)

  def pairs(
    self, source: SourceOptions, selection: Selection, split: str
  ) -> Iterator[Pair]:
    """The pairs of texts, of which neither is empty, in order."""
    pairs = self.open(source, selection).pairs(split)
    return ((inputs, target) for inputs, target in pairs if inputs and target)


def _tokenized(
  corpus: Texts | Pairs, tokenizer: TokenizerOptions, cache_dir: str
) -> pathlib.Path:
  """The cache's folder with the tokens of both splits."""
  key = f'{store.FORMAT} {corpus.identity} {tokenizer.identity()}'
  name = hashlib.sha256(key.encode()).hexdigest()[:32]

  def write(folder: pathlib.Path) -> None:
    texts = (text for split in SPLITS for text in corpus.texts(split))
    corpus.write(folder, tokenizer.fit(texts))

  return prepared(cache_root(cache_dir) / 'tokens' / name, write)
