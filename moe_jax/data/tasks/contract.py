"""The contract of tasks, which make rows of batches from a source."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from moe_jax.config import Options, required
from moe_jax.data import pieces, store
from moe_jax.data.layouts import RowShape
from moe_jax.data.packing import Rows
from moe_jax.data.sources.contract import (
  SPLITS,
  Pairs,
  Selection,
  SourceOptions,
  Texts,
)
from moe_jax.data.tokenizers import Tokenizer, TokenizerOptions, load


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A corpus in rows of tokens, and the task that is learned from it.

  Attributes:
    source: Description of the source for messages.
    tokenizer: Tokenizer as fitted when the corpus was tokenized, with the ids
      that the task adds.
    splits: Rows of 'train' and of 'validation'.
    digest: The sha256 of both splits' texts, in order, or of the pieces' sha256
      where texts were tokenized in pieces; results are comparable only if the
      digests are equal.
    counts: Numbers by name for each split. Texts have 'documents', 'bytes' (of
      UTF-8) and 'tokens'; pairs have 'pairs', 'bytes', 'input_tokens',
      'target_tokens' (without EOS) and 'truncated', the number of pairs that
      are too long for a row.
    task: Options of the task.
    parts: The dataset of each source of a mixture by name, also of sources that
      are only evaluated; empty for a single source.
  """

  source: str
  tokenizer: Tokenizer
  splits: dict[str, Rows]
  digest: str
  counts: dict[str, dict[str, int]]
  task: 'TaskOptions'
  parts: Mapping[str, 'Dataset'] = dataclasses.field(default_factory=dict)

  @property
  def vocab_size(self) -> int:
    """V, the number of ids that a model of this data needs."""
    return self.tokenizer.vocab_size

  def describe(self) -> str:
    """Lines on the data, to be printed at the start of a run."""
    counted = [
      f'{sum(counts[key] for counts in self.counts.values()):,} {key}'
      for key in ('documents', 'pairs', 'bytes')
      if key in self.counts['train']
    ]
    lines = [f'data: {self.source}, {", ".join(counted)}, sha256 {self.digest}']
    if self.task.label:
      lines.append(f'task: {self.task.label}')
    lines.append(f'tokenizer: {self.tokenizer.label}, V={self.vocab_size}')
    for split, rows in self.splits.items():
      counts = ', '.join(
        f'{count:,} {name.replace("_", " ")}'
        for name, count in self.counts[split].items()
      )
      lines.append(f'{split}: {counts}, {rows.describe()}')
    return '\n'.join(lines)

  def tell(self, row: Mapping[str, float]) -> str:
    """The text of an evaluation's numbers, to be printed after its name."""
    return ', '.join(f'{name} {value:.4g}' for name, value in row.items())


class TaskOptions(Options):
  """Contract of a task: the rows that it cuts from streams of tokens.

  The cache has whole streams of tokens, by the content of the source and the
  tokenizer, so that other lengths and tasks can use the same streams. Other
  code depends on these attributes and never on a task's name.

  Attributes:
    reads: What the task reads of a source: 'texts', whose stream is tokens and
      starts, or 'pairs', with a stream of inputs and a stream of targets.
    label: Name of the task that a run prints; '' (of a language model) prints
      none.
    makes_examples: Whether a row has examples, each of inputs and targets. Only
      such rows can have an encoder's side or be shared.
    generates: Whether a model can generate text for the inputs that can be
      compared with the targets.
    answers_go_on: Whether targets directly continue the text of the inputs in a
      decoder-only model, without a token in between.
    input_prefix: Text that the task puts before all inputs.
    keep_end: Whether inputs that are too long lose their beginning, not their
      end.
  """

  reads: ClassVar[str] = 'texts'
  label: ClassVar[str]
  makes_examples: ClassVar[bool] = True
  generates: ClassVar[bool] = False
  answers_go_on: ClassVar[bool] = False
  input_prefix: ClassVar[str] = ''
  keep_end: ClassVar[bool] = False

  def open(self, source: SourceOptions, selection: Selection) -> Texts | Pairs:
    """The source's texts, or its pairs after the prefix of their inputs."""
    if self.reads == 'texts':
      return source.texts(selection)
    return source.pairs(selection).with_prefix(self.input_prefix)

  def vocabulary(self, base: Tokenizer, shape: RowShape) -> Tokenizer:
    """The tokenizer with the ids that the task adds; by default none."""
    del shape
    return base

  @required
  def rows(self, stream: Any, tokenizer: Tokenizer, shape: RowShape) -> Rows:
    """The rows of one split.

    Args:
      stream: Tokens of the split, from `Texts.read` or `Pairs.read`.
      tokenizer: Tokenizer from `vocabulary`.
      shape: Lengths of the rows.

    Raises:
      ValueError: A row is too short for the task.
    """
    raise NotImplementedError

  def load(
    self,
    source: SourceOptions,
    tokenizer: TokenizerOptions,
    selection: Selection,
    shape: RowShape,
  ) -> Dataset:
    """The dataset, tokenized now unless it is in the cache.

    Tokens are memory-mapped.

    Raises:
      ValueError: The data is missing or bad, a split is empty, or a row is too
        short for the task.
    """
    corpus = self.open(source, selection)
    folder = pieces.make(corpus, tokenizer, selection).folder
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
