"""The options of a run's data, and the dataset that they describe."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import cast

from moe_jax.config import CUSTOM, Options, choice, fields_of, no_effect, option
from moe_jax.data import mixtures, tokenizers
from moe_jax.data.layouts import RowShape
from moe_jax.data.mixtures import MixtureOptions
from moe_jax.data.sources import (
  SOURCES,
  DocstringsSource,
  PythonStdlibSource,
)
from moe_jax.data.sources.contract import Pair, Pairs, Selection, SourceOptions
from moe_jax.data.tasks import TASKS
from moe_jax.data.tasks.contract import Dataset, TaskOptions
from moe_jax.data.tokenizers import (
  TOKENIZERS,
  BytesOptions,
  Extended,
  Fitted,
  Tokenizer,
  TokenizerOptions,
)
from moe_jax.data.tokenizers.extra_ids import without_endings

# A source from Python's own library, for small runs, by what a task reads.
_EMBEDDED = {'texts': PythonStdlibSource(), 'pairs': DocstringsSource()}


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
  """Source, tokenizer and task of a run's data, and the shape of its rows."""

  source: SourceOptions = choice(
    SOURCES,
    'python_stdlib',
    'Source of the texts or pairs of texts.',
  )
  mixture: MixtureOptions = option(
    MixtureOptions(), 'Sources that are learned from together.'
  )
  tokenizer: TokenizerOptions = choice(
    TOKENIZERS,
    'bytes',
    'Tokenizer that turns text into token ids.',
  )
  task: TaskOptions = choice(
    TASKS, 'lm', 'Task that is learned from the source.'
  )
  seq_len: int = option(
    256,
    'Number T of tokens in a row of a batch; for an encoder-decoder model, in '
    'a row of the encoder.',
    minimum=1,
  )
  target_len: int = option(
    0,
    'Number of tokens in a row of the decoder of an encoder-decoder model; 0 '
    'is for a decoder-only model, whose rows have the inputs before the '
    'targets.',
    minimum=0,
  )
  pack: bool = option(
    True, 'Whether short examples of inputs and targets share a row.'
  )
  train_split: str = option(
    'train',
    "The source's own name of the split for training. TFDS sources, as well "
    'as python_stdlib and its docstrings, take any split expression, such as '
    "'train[:90%]'.",
  )
  validation_split: str = option(
    'validation',
    "The source's own name of the split for validation.",
  )
  cache_dir: str = option(
    '',
    'Folder for token streams and the corpus from Python; an empty string is '
    '$MOE_JAX_CACHE or ~/.cache/moe_jax. TFDS datasets stay in '
    '$TFDS_DATA_DIR.',
  )
  cache_digests: bool = option(
    True,
    'Whether the sha256 of the files in the cache are checked when a run '
    'starts, which takes about 0.5 s per GB in each process; sizes, and '
    'digests of small files, are always checked.',
  )

  @property
  def tasks(self) -> tuple[str, ...]:
    """The names of a mixture's sources, its tasks, in the order of task ids.

    Held-out sources are among them; () where there is no mixture.
    """
    return tuple(sorted(self.mixture.sources))

  @property
  def shape(self) -> RowShape:
    """The lengths of rows, and whether short examples share a row."""
    return RowShape(self.seq_len, self.target_len, self.pack)

  @property
  def encoder_decoder(self) -> bool:
    """Whether the batches have an encoder's side."""
    return self.shape.encoder_decoder

  @property
  def row_tokens(self) -> int:
    """The number of tokens of a row, on the encoder's and decoder's sides."""
    return self.seq_len + self.target_len

  @property
  def selection(self) -> Selection:
    """The splits of the source that are read, and how the cache is used."""
    splits = self.train_split, self.validation_split
    return Selection(splits, self.cache_dir, self.cache_digests)

  def with_tokenizer(self, tokenizer: Tokenizer) -> 'DataOptions':
    """The options with the tokenizer of a run in place of their own.

    The tokenizer may have ids that the run's task added. Where the task of
    these options would add the same ids, these ids are taken off, as the task
    adds them anyway, so that the data of the same run stays what it was. Ids
    that another task added stay.
    """
    run_tokenizer = without_endings(tokenizer)
    if isinstance(run_tokenizer, Extended):
      task_vocabulary = self.task.vocabulary(run_tokenizer.base, self.shape)
      if task_vocabulary.ids_identity == run_tokenizer.ids_identity:
        run_tokenizer = run_tokenizer.base
    fitted = Fitted(run_tokenizer, self.tokenizer)
    return dataclasses.replace(self, tokenizer=fitted)

  def with_tokenizer_of(self, *folders: str | pathlib.Path) -> 'DataOptions':
    """The options with the tokenizer of the first run that has a tokenizer.

    Without a tokenizer in any of the folders of runs, the options stay.
    Raises:
      ValueError: The tokenizer cannot be read.
    """
    for folder in folders:
      path = pathlib.Path(folder).expanduser() / tokenizers.RUN_FILE
      if path.is_file():
        return self.with_tokenizer(tokenizers.read(path))
    return self

  def problems(self) -> Iterator[str]:
    """Yields a text for each contradiction between source, task and rows."""
    if not self.task.makes_examples:
      reason = 'unless the task makes examples of inputs and targets'
      yield from self.in_vain(reason, 'target_len', 'pack')
    if not self.mixture.sources:
      yield from self._problems_of(self.source, 'source.', nested=True)
      return
    if self.source != fields_of(DataOptions)['source'].default:
      kind = SOURCES.name_of(self.source)
      yield no_effect('source.kind', kind, 'with sources in data.mixture')
    for name, source in self.mixture.sources.items():
      path = f'mixture.sources.{name}.'
      yield from self._problems_of(source, path, nested=False)

  def _problems_of(
    self, source: SourceOptions, path: str, *, nested: bool
  ) -> Iterator[str]:
    form, kind = self.task.reads, SOURCES.name_of(source)
    if form not in source.gives():
      kinds = sorted(k for k, s in SOURCES.builtin.items() if form in s.gives())
      forms = source.gives()
      tasks = sorted(k for k, t in TASKS.builtin.items() if t.reads in forms)
      yield (
        f'{path}kind={kind!r} gives {" and ".join(forms)}, '
        f'task.kind={TASKS.name_of(self.task)!r} reads {form}; sources that '
        f'give {form}: {kinds}; values of task.kind that read '
        f'{" or ".join(forms)}: {tasks}'
      )
    section = kind if kind in SOURCES.builtin else CUSTOM
    path = f'{path}{section}.' if nested else path
    names = [name for name, only in source.only_in.items() if only != form]
    if names:
      for text in source.in_vain(f'where {form} are read', *names):
        yield f'{path}{text}'

  def shrunk(self) -> 'DataOptions':
    """The same task in short rows, on the corpus from Python as bytes."""
    embedded = _EMBEDDED[self.task.reads]
    mixed = bool(self.mixture.sources)
    return DataOptions(
      source=PythonStdlibSource() if mixed else embedded,
      mixture=self.mixture.shrunk_with(embedded),
      tokenizer=BytesOptions(),
      task=self.task,
      seq_len=32,
      target_len=24 if self.target_len else 0,
      pack=self.pack,
      cache_dir=self.cache_dir,
      cache_digests=self.cache_digests,
    )


def load(options: DataOptions) -> Dataset:
  """The dataset of `options`, tokenized now unless it is in the cache.

  Raises:
    ValueError: The data is missing or bad; a text has a character that the
      tokenizer lacks; a split is empty; a row is too short for the task, or
      there are too few sentinels.
  """
  rest = options.tokenizer, options.selection, options.shape
  if options.mixture.sources:
    return mixtures.load(options.mixture, options.task, *rest)
  return options.task.load(options.source, *rest)


def read_pairs(options: DataOptions, split: str) -> Iterator[Pair] | None:
  """The pairs of texts from which the rows of a split are made, in order.

  A mixture gives the pairs of every source that is learned from, in turn. Pairs
  with an empty side are left out; pairs with a side that has text but no tokens
  are given, although no row has them. The result is None where the task makes
  examples from texts, not from pairs.
  """
  if options.task.reads != 'pairs':
    return None
  mixture = options.mixture
  sources = [mixture.sources[name] for name in mixture.learned()]
  corpora = [
    cast(Pairs, options.task.open(source, options.selection))
    for source in sources or [options.source]
  ]
  return (pair for c in corpora for pair in c.pairs(split) if all(pair))
