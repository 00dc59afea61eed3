"""The options of a run's data, and the dataset that they describe."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax.config import CUSTOM, Options, choice, fields_of, no_effect, option
from moe_jax.data import pieces, store, tokenizers
from moe_jax.data.cache_folders import FORMAT, NotPreparedError
from moe_jax.data.contracts import (
  SPLITS,
  Dataset,
  Selection,
  SourceOptions,
  TaskOptions,
)
from moe_jax.data.layouts import RowShape
from moe_jax.data.mixing import MixedRows, Schedule, TaskRows, whole_counts
from moe_jax.data.mixtures import MixtureOptions
from moe_jax.data.sources import SOURCES, DocstringsSource, PythonStdlibSource
from moe_jax.data.tasks import TASKS
from moe_jax.data.tokenizers import TOKENIZERS, Tokenizer, TokenizerOptions
from moe_jax.data.tokenizers.extra_ids import without_endings
from moe_jax.errors import InputError

# The source of small runs, made from Python's own library, for tasks that read
# texts and for tasks that read pairs.
_EMBEDDED = {'texts': PythonStdlibSource(), 'pairs': DocstringsSource()}


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
  """Source, tokenizer and task of a run's data, and the shape of its rows."""

  source: SourceOptions = choice(
    SOURCES, 'python_stdlib', 'Source of the texts or pairs of texts.'
  )
  mixture: MixtureOptions = option(
    MixtureOptions(), 'Sources that are learned from together.'
  )
  tokenizer: TokenizerOptions = choice(
    TOKENIZERS, 'bytes', 'Tokenizer that turns text into token ids.'
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
    "The source's own name of the training split. TFDS sources, python_stdlib "
    "and its docstrings take any split expression, such as 'train[:90%]'.",
  )
  validation_split: str = option(
    'validation', "The source's own name of the split for validation."
  )
  cache_dir: str = option(
    '',
    'Folder for token streams; an empty string is $MOE_JAX_CACHE or '
    '~/.cache/moe_jax. A folder at a URL, such as gs://bucket/tokens, is '
    'copied there. TFDS datasets stay in $TFDS_DATA_DIR.',
  )
  cache_digests: bool = option(
    True,
    'Whether the sha256 of the files in the cache are checked when a run '
    'starts, which takes about 0.5 s per GB in each process; sizes, and '
    'digests of small files, are always checked.',
  )

  @property
  def tasks(self) -> tuple[str, ...]:
    """The sorted names of a mixture's sources; each source counts as a task.

    The index of a name is the task id of the source. Held-out sources are among
    them. The tuple is empty where there is no mixture.
    """
    return tuple(sorted(self.mixture.sources))

  @property
  def shape(self) -> RowShape:
    """The lengths of rows, and whether short examples share a row."""
    return RowShape(self.seq_len, self.target_len, self.pack)

  @property
  def row_tokens(self) -> int:
    """The tokens of a row, of the encoder's and the decoder's side together."""
    return self.seq_len + self.target_len

  @property
  def selection(self) -> Selection:
    """The splits of the source that are read, and how the cache is used."""
    splits = self.train_split, self.validation_split
    return Selection(splits, self.cache_dir, self.cache_digests)

  def with_tokenizer(self, tokenizer: Tokenizer) -> 'DataOptions':
    """The options with the tokenizer of a run in place of their own.

    The tokenizer may have ids that the run's task added. If the task of these
    options would add exactly the same ids, they are first removed from the
    tokenizer, so that the options of that run itself find their data in the
    cache. Otherwise the ids stay.
    """
    run_tokenizer = without_endings(tokenizer)
    if isinstance(run_tokenizer, tokenizers.Extended):
      task_vocabulary = self.task.vocabulary(run_tokenizer.base, self.shape)
      if task_vocabulary.ids_identity == run_tokenizer.ids_identity:
        run_tokenizer = run_tokenizer.base
    fitted = tokenizers.Fitted(run_tokenizer, self.tokenizer)
    return dataclasses.replace(self, tokenizer=fitted)

  def with_tokenizer_of(self, *folders: str | pathlib.Path) -> 'DataOptions':
    """The options with the tokenizer of the first run folder that has one.

    If none of `folders` has a tokenizer, the options are returned unchanged.

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
    sources = self.mixture.sources
    if sources and self.source != fields_of(DataOptions)['source'].default:
      kind = SOURCES.name_of(self.source)
      yield no_effect('source.kind', kind, 'with sources in data.mixture')
    paths = {f'mixture.sources.{name}.': sources[name] for name in sources}
    form = self.task.reads
    for path, source in (paths or {'source.': self.source}).items():
      kind, forms = SOURCES.name_of(source), source.gives()
      if form not in forms:
        kinds = [k for k, s in SOURCES.builtin.items() if form in s.gives()]
        tasks = [k for k, t in TASKS.builtin.items() if t.reads in forms]
        yield (
          f'{path}kind={kind!r} gives {" and ".join(forms)}, '
          f'task.kind={TASKS.name_of(self.task)!r} reads {form}; sources that '
          f'give {form}: {sorted(kinds)}; values of task.kind that read '
          f'{" or ".join(forms)}: {sorted(tasks)}'
        )
      if not sources:
        path += f'{kind if kind in SOURCES.builtin else CUSTOM}.'
      names = [name for name, only in source.only_in.items() if only != form]
      if names:
        for text in source.in_vain(f'where {form} are read', *names):
          yield f'{path}{text}'

  def shrunk(self) -> 'DataOptions':
    """Options of a small run of the same task, without any files of the user.

    Rows are short, tokens are bytes, and the source is Python's standard
    library. Of a mixture only sources that need no file stay; the standard
    library replaces each of the others.
    """
    embedded = _EMBEDDED[self.task.reads]
    return dataclasses.replace(
      self,
      source=PythonStdlibSource() if self.mixture.sources else embedded,
      mixture=self.mixture.shrunk_with(embedded),
      tokenizer=tokenizers.BytesOptions(),
      seq_len=32,
      target_len=24 if self.target_len else 0,
      train_split='train',
      validation_split='validation',
    )


@dataclasses.dataclass(frozen=True)
class MixedDataset(Dataset):
  """The dataset of a mixture.

  Attributes:
    mixture: The options of the mixture.
    per_period: For each source that is learned from, its number of rows in a
      period of the mixture.
  """

  mixture: MixtureOptions = MixtureOptions()
  per_period: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def describe(self) -> str:
    """The lines that describe any dataset, and a line for each source."""
    width, period = max(map(len, self.parts)), sum(self.per_period.values())
    lines = [f'mixture, by rows in each period of {period:,}:']
    for name, part in self.parts.items():
      cluster, counts = self.mixture.cluster(name), part.counts['train']
      count = self.per_period.get(name)
      rate = '  held out' if count is None else f'{count:>10,}'
      keys = ('documents', 'pairs', 'truncated')
      numbers = [f'{counts[key]:,} {key}' for key in keys if key in counts]
      numbers.append(part.splits['train'].describe())
      note = f' ({cluster})' * (cluster != name)
      lines.append(f'  {name:{width}}{rate}: {", ".join(numbers)}{note}')
    return '\n'.join([super().describe(), *lines])

  def tell(self, row: Mapping[str, float]) -> str:
    """Metrics by name as text: a line for each cluster, then all others.

    A metric named like a source, also with '.' and more behind, belongs to its
    cluster; a cluster's held-out sources have a line of their own.
    """
    means, groups, text_of = dict(row), {}, super().tell
    for name in sorted(self.parts.keys() & row.keys()):
      held_out = ' (held out)' * (name not in self.per_period)
      keys = [k for k in means if k == name or k.startswith(f'{name}.')]
      label = f'{self.mixture.cluster(name)}{held_out}'
      groups.setdefault(label, {}).update({k: means.pop(k) for k in keys})
    lines = [f'{label}: {text_of(values)}' for label, values in groups.items()]
    last = [text_of(means)] if means else []
    return '\n  '.join(['', *sorted(lines), *last] if lines else last)


def load(
  options: DataOptions, engine: pieces.Engine = pieces.Engine()
) -> Dataset:
  """The dataset of `options`, tokenized by `engine` unless it is in the cache.

  One tokenizer serves all sources of a mixture; if it depends on texts, it is
  fitted to the texts of all sources.

  Raises:
    ValueError: The data is missing or bad; a text has a character that the
      tokenizer lacks; a split is empty; a row is too short for the task, or
      there are too few sentinels; the period of a mixture is too short to
      have a row of every source that is learned from. Where the data of one
      source of a mixture is at fault, the message names the source.
    NotPreparedError: A source is missing in the cache within `reading_only`.
  """
  mixture, parts = options.mixture, {}
  if not mixture.sources:
    return _load(options, options.source, options.tokenizer, engine)
  tokenizer = shared_tokenizer(options)
  # The sources are sorted, since a config keeps no order of them, and a run
  # must be the same when its config is read again.
  for number, (name, source) in enumerate(sorted(mixture.sources.items())):
    try:
      part = _load(options, source, tokenizer, engine)
    except NotPreparedError:
      raise
    except InputError as error:
      raise InputError(f'mixture.sources.{name}: {error}') from error
    splits = {s: TaskRows(rows, number) for s, rows in part.splits.items()}
    parts[name] = dataclasses.replace(part, splits=splits)
  sizes = {name: len(parts[name].splits['train']) for name in mixture.learned()}
  per_period = whole_counts(mixture.shares(sizes), mixture.period)
  schedule = Schedule(np.array([*per_period.values()]))
  splits, counts = {}, {}
  for split in SPLITS:
    rows = {name: parts[name].splits[split] for name in per_period}
    splits[split] = MixedRows(rows, schedule)
    learned = [parts[name].counts[split] for name in per_period]
    counts[split] = {k: sum(part[k] for part in learned) for k in learned[0]}
  digests = ''.join(f'{name} {part.digest}\n' for name, part in parts.items())
  return MixedDataset(
    source=f'mixture of {len(per_period)} sources',
    tokenizer=next(iter(parts.values())).tokenizer,
    splits=splits,
    digest=hashlib.sha256(digests.encode()).hexdigest(),
    counts=counts,
    task=options.task,
    parts=parts,
    mixture=mixture,
    per_period=per_period,
  )


def _load(
  options: DataOptions,
  source: SourceOptions,
  tokenizer: TokenizerOptions,
  engine: pieces.Engine,
) -> Dataset:
  """The dataset of `source`, by `tokenizer` in place of that of `options`."""
  task, shape = options.task, options.shape
  corpus = task.open(source, options.selection)
  folder = pieces.make(corpus, tokenizer, options.selection, engine)
  about = store.read_about(folder)
  fitted = tokenizers.load(folder / 'tokenizer.json')
  vocabulary, splits, counts = task.vocabulary(fitted, shape), {}, {}
  for split in SPLITS:
    stream = store.read(folder, split, corpus.streams)
    splits[split] = rows = task.rows(stream, vocabulary, shape)
    counts[split] = {**about['splits'][split], **rows.counts()}
  return Dataset(
    source=corpus.name,
    tokenizer=vocabulary,
    splits=splits,
    digest=about['sha256'],
    counts=counts,
    task=task,
  )


def shared_tokenizer(options: DataOptions) -> TokenizerOptions:
  """The options of the one tokenizer that all sources of a mixture share.

  If the tokenizer depends on texts, this function fits it to the texts of all
  sources and keeps it in the cache, where it is found again by its options and
  the identities of the texts.

  Raises:
    ValueError: The data of a source is missing or bad.
    NotPreparedError: The texts would have to be read within `reading_only`.
  """
  tokenizer, selection = options.tokenizer, options.selection
  if tokenizer.known_vocab_size() is not None:
    return tokenizer
  sources = sorted(options.mixture.sources.items())
  corpora = [options.task.open(source, selection) for _, source in sources]

  identities = [corpus.identity for corpus in corpora]
  key = f'{FORMAT} {identities} {tokenizer.identity()}'
  name = hashlib.sha256(key.encode()).hexdigest()[:32]
  folder = selection.cache / 'tokenizers' / name
  url = selection.url('tokenizers', name)
  return tokenizers.Fitted(pieces.fit(tokenizer, corpora, folder, url))


def read_pairs(
  options: DataOptions, split: str
) -> Iterator[tuple[str, str]] | None:
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
  corpora: Any = [
    options.task.open(source, options.selection)
    for source in sources or [options.source]
  ]
  return (pair for c in corpora for pair in c.pairs(split) if all(pair))
