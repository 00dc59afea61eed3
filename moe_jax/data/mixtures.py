"""Mixtures of sources: their weights, and the dataset that they make.

The rules are those of T5 (https://arxiv.org/abs/1910.10683, section 3.5.2).
"""

import ast
import dataclasses
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax.config import (
  KIND,
  OptionError,
  Options,
  entries,
  fields_of,
  option,
  unknown,
)
from moe_jax.data.cache_folders import (
  FORMAT,
  NotPreparedError,
  prepared,
)
from moe_jax.data.layouts import RowShape
from moe_jax.data.mixing import (
  MixedRows,
  Schedule,
  TaskRows,
  whole_counts,
)
from moe_jax.data.sources import SOURCES
from moe_jax.data.sources.contract import SPLITS, Selection, SourceOptions
from moe_jax.data.tasks.contract import Dataset, TaskOptions
from moe_jax.data.tokenizers import Fitted, TokenizerOptions
from moe_jax.data.tokenizers import load as load_tokenizer
from moe_jax.errors import InputError

_ENTRY = re.compile(
  r'(?P<name>[A-Za-z_]\w*)\s*:\s*(?P<kind>[\w.:]+)\s*'
  r'(?:\((?P<options>.*)\))?\s*(?:\*\s*(?P<weight>[\w.+-]+))?',
  re.DOTALL,
)
# The text of a source in `lines`. Its first option needs no name: it is the
# first option that the kind of source requires (a pattern, the name of a
# dataset), or else the kind's first option. A value with a comma or bracket of
# its own is quoted; a line that begins with '#' is a comment.
_FORM = 'name:kind(option, option=value)*weight'
_PAIR = re.compile(r'\s*([A-Za-z_]\w*)\s*=(.*)', re.DOTALL)
# Names that evaluations of every source give to means over sources.
_MEANS = ('mean', 'cluster_mean', 'held_out_mean', 'held_out_cluster_mean')


@dataclasses.dataclass(frozen=True)
class MixtureOptions(Options):
  """The sources of a mixture, and how often a run sees each of them."""

  sources: Mapping[str, SourceOptions] = entries(
    SOURCES,
    {},
    'Kind of a source of the mixture. Each entry of `sources` is a source, '
    'with a name that the user chooses; without an entry, data.source is the '
    'only source.',
  )
  lines: str = option(
    '',
    "Sources and weights that are added as text, 'books:files(books/*.txt)*2, "
    "code:files(code/*.gz)': a name, a kind, its options and a weight each; "
    'empty adds none.',
  )
  rule: str = option(
    'proportional',
    "Rule of the weights: 'proportional' to the number of training rows up to "
    "mixture.cap, its root by 'temperature', or 'given' by mixture.weights.",
    choices=('proportional', 'temperature', 'given'),
  )
  cap: int = option(
    0,
    'Number of rows above which a source counts as having no more, as in the '
    'examples-proportional mixing of T5; 0 sets no limit.',
    minimum=0,
  )
  temperature: float = option(
    2.0,
    'Temperature T of the weights, which are the numbers of rows to the power '
    '1/T; 1 is proportional, a large one makes all weights equal.',
    minimum=1,
  )
  weights: Mapping[str, float] = option(
    {},
    'Weight of each source by name, relative to the others; a source without '
    'one has the weight 1, and with 0 it is only evaluated.',
  )
  held_out: str = option(
    '',
    'Names of sources or of clusters of sources that are evaluated but not '
    'learned from, separated by commas; an empty text holds out none.',
  )
  period: int = option(
    1000,
    'Number of rows after which every source has been seen exactly as often as '
    'its weight says, rounded to whole rows by largest remainders.',
    minimum=1,
  )

  def __post_init__(self):
    """Turns `lines` into sources and weights, and checks all options."""
    names = 'sources', 'lines', 'rule', 'weights'
    section = self.spelled_out({name: getattr(self, name) for name in names})
    sources = {
      name: source if isinstance(source, Options) else _options(source)
      for name, source in section['sources'].items()
    }
    for name, value in {**section, 'sources': sources}.items():
      object.__setattr__(self, name, value)
    super().__post_init__()

  @classmethod
  def spelled_out(cls, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mixture's section of a config, with `lines` turned into `sources`.

    A weight in `lines` replaces the default `rule` by 'given'.

    Raises:
      OptionError: The text of a source in `lines` is wrong, or its name is
        taken; the message quotes the text.
    """
    text = section.get('lines', '')
    if not isinstance(text, str) or not text.strip():
      return section
    sources = dict(section.get('sources', {}))
    weights = dict(section.get('weights', {}))
    usual_rule = fields_of(cls)['rule'].default
    rule = section.get('rule', usual_rule)
    for entry in _split(text, ',\n'):
      try:
        name, source, weight = _read_entry(entry)
        if name in sources:
          raise InputError(f'there is a source {name!r} already')
      except InputError as error:
        raise OptionError([f'lines: entry {entry!r}: {error}']) from None
      sources[name] = source
      if weight is not None:
        weights[name] = weight
        rule = 'given' if rule == usual_rule else rule
    changes = {'sources': sources, 'weights': weights, 'rule': rule}
    return {**section, **changes, 'lines': ''}

  def problems(self) -> Iterator[str]:
    """Yields a text for each problem of names and weights."""
    if not self.sources:
      yield from self.in_vain('without sources')
      return
    if self.rule == 'given':
      yield from self.in_vain("with rule='given'", 'cap')
    else:
      yield from self.in_vain("unless rule is 'given'", 'weights')
    if self.rule != 'temperature':
      yield from self.in_vain("unless rule is 'temperature'", 'temperature')
    for name in self.sources:
      if name in _MEANS:
        yield (
          f'sources.{name}: {list(_MEANS)} are names of means over sources in '
          'evaluations; give the source another name'
        )
    for name, weight in self.weights.items():
      if name not in self.sources:
        yield f'weights: {unknown("source", name, self.sources)}'
      elif self.is_held_out(name) and weight not in (0, 1):
        yield (
          f'weights.{name}={weight!r} has no effect, since '
          f'held_out={self.held_out!r} holds the source out'
        )
      number = isinstance(weight, int | float) and not isinstance(weight, bool)
      if not number or not 0 <= weight < float('inf'):
        yield f'weights.{name}={weight!r} is no number of at least 0'
    clusters = set(map(self.cluster, self.sources))
    for name in self._held_out():
      if name not in {*self.sources, *clusters}:
        names = sorted({*self.sources, *clusters})
        yield f'held_out: {unknown("source or cluster", name, names)}'
    if not self.learned():
      weights = f' with weights={dict(self.weights)}' * bool(self.weights)
      yield (
        f'held_out={self.held_out!r}{weights} leaves no source to learn from'
      )

  def cluster(self, name: str) -> str:
    """The name of the cluster, a group of similar sources, of a source.

    A source without a cluster is a cluster by itself, under its own name.
    """
    return self.sources[name].cluster or name

  def is_held_out(self, name: str) -> bool:
    """Whether a source is evaluated and not learned from."""
    return bool({name, self.cluster(name)} & set(self._held_out()))

  def learned(self) -> list[str]:
    """The names of the sources that are learned from, sorted."""
    weights = self.weights if self.rule == 'given' else {}
    names = [n for n in sorted(self.sources) if not self.is_held_out(n)]
    return [name for name in names if weights.get(name, 1.0)]

  def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
    """The relative weights of sources, given their numbers of training rows."""
    if self.rule == 'given':
      return {name: float(self.weights.get(name, 1.0)) for name in sizes}
    power = 1 / self.temperature if self.rule == 'temperature' else 1.0
    limit = self.cap or float('inf')
    return {n: float(min(size, limit)) ** power for n, size in sizes.items()}

  def shrunk_with(self, embedded: SourceOptions) -> 'MixtureOptions':
    """The same mixture, small; `embedded` replaces sources that read files."""
    sources = {
      name: source.shrunk() if source.is_embedded else embedded
      for name, source in self.sources.items()
    }
    held_out = ','.join(n for n in self.sources if self.is_held_out(n))
    return dataclasses.replace(self, sources=sources, held_out=held_out)

  def _held_out(self) -> list[str]:
    return [name.strip() for name in self.held_out.split(',') if name.strip()]


def _options(section: Mapping[str, Any]) -> Options:
  options = {key: value for key, value in section.items() if key != KIND}
  return SOURCES.get(section[KIND])(**options)


def _read_entry(entry: str) -> tuple[str, dict[str, Any], float | None]:
  """Reads the text of a source in `lines`: its name, options and weight.

  The options are a section of a config; the weight is None if none is given.
  """
  match = _ENTRY.fullmatch(entry)
  if match is None:
    raise InputError(f'it is not of the form {_FORM}')
  cls, source = SOURCES.get(match['kind']), {KIND: match['kind']}
  fields = fields_of(cls)
  required = [n for n in fields if fields[n].default is dataclasses.MISSING]
  unnamed = next(iter([*required, *fields]), '')
  for number, text in enumerate(_split(match['options'] or '', ',')):
    pair = _PAIR.fullmatch(text)
    if pair is None and number:
      raise InputError(f'option {text!r} has no name; {_FORM}')
    name, value = pair.groups() if pair else (unnamed, text)
    if name not in fields:
      raise unknown(f'option of {match["kind"]}', name, fields)
    source[name] = _value(value, fields[name].type)
  missing = [name for name in required if name not in source]
  if missing and cls in SOURCES.builtin.values():
    raise InputError(f'option {missing[0]!r} of {match["kind"]} is missing')
  weight = match['weight']
  try:
    return match['name'], source, None if weight is None else float(weight)
  except ValueError:
    raise InputError(f'weight {weight!r} is no number') from None


def _split(text: str, separators: str) -> list[str]:
  """Splits a text at the separators that are in no brackets and no quotes.

  Empty parts and comments are left out.

  Raises:
    OptionError: A bracket or quote is not closed.
  """
  text = re.sub(r'^\s*#.*$', '', text, flags=re.MULTILINE)
  parts, depth, quote = [''], 0, ''
  for letter in text:
    if quote:
      quote = '' if letter == quote else quote
    elif letter in '\'"':
      quote = letter
    elif letter in '()':
      depth += 1 if letter == '(' else -1
    if letter in separators and not depth and not quote:
      parts.append('')
    else:
      parts[-1] += letter
  parts = [part.strip() for part in parts if part.strip()]
  if depth or quote:
    where = f'lines: {parts[-1]!r:.80}'
    raise OptionError([f'{where} has an open bracket or quote'])
  return parts


def _value(text: str, hint: Any) -> Any:
  """The value that a text gives to an option whose type is `hint`."""
  text = text.strip()
  if hint is str and text[:1] not in ('"', "'"):
    return text
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text  # refused where the options are read


@dataclasses.dataclass(frozen=True)
class MixedDataset(Dataset):
  """The dataset of a mixture.

  Attributes:
    clusters: The cluster of each source.
    per_period: The number of rows in a period of each source that is learned
      from.
  """

  clusters: Mapping[str, str] = dataclasses.field(default_factory=dict)
  per_period: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def describe(self) -> str:
    """The lines that describe any dataset, and a line for each source."""
    width = max(map(len, self.parts))
    period = sum(self.per_period.values())
    lines = [f'mixture, by rows in each period of {period:,}:']
    for name, part in self.parts.items():
      cluster = self.clusters[name]
      count = self.per_period.get(name)
      rate = '  held out' if count is None else f'{count:>10,}'
      numbers = [
        f'{part.counts["train"][key]:,} {key}'
        for key in ('documents', 'pairs', 'examples', 'truncated')
        if key in part.counts['train']
      ]
      numbers.append(part.splits['train'].describe())
      note = f' ({cluster})' * (cluster != name)
      lines.append(f'  {name:{width}}{rate}: {", ".join(numbers)}{note}')
    return '\n'.join([super().describe(), *lines])

  def tell(self, row: Mapping[str, float]) -> str:
    """The text of an evaluation: a line for each cluster, then the means."""
    means, groups, text_of = dict(row), {}, super().tell
    for name in sorted(self.parts.keys() & row.keys()):
      held_out = ' (held out)' * (name not in self.per_period)
      keys = [k for k in means if k == name or k.startswith(f'{name}.')]
      group = groups.setdefault(f'{self.clusters[name]}{held_out}', {})
      group.update({key: means.pop(key) for key in keys})
    lines = [f'{label}: {text_of(values)}' for label, values in groups.items()]
    last = [text_of(means)] if means else []
    return '\n  '.join(['', *sorted(lines), *last] if lines else last)


def shared_tokenizer(
  sources: Mapping[str, SourceOptions],
  task: TaskOptions,
  tokenizer: TokenizerOptions,
  selection: Selection,
) -> TokenizerOptions:
  """The tokenizer of all sources, fitted to their texts if it depends on them.

  A tokenizer that is fitted is kept in the cache, and is found there by its
  options and the identities of the texts.

  Raises:
    ValueError: The data of a source is missing or bad.
    NotPreparedError: The texts would have to be read within `reading_only`.
  """
  if tokenizer.known_vocab_size() is not None:
    return tokenizer
  corpora = [task.open(sources[name], selection) for name in sorted(sources)]

  def write(folder: pathlib.Path) -> None:
    texts = itertools.chain.from_iterable(
      corpus.texts(split) for corpus in corpora for split in SPLITS
    )
    tokenizer.fit(texts).save(folder / 'tokenizer.json')

  identities = [corpus.identity for corpus in corpora]
  key = f'{FORMAT} {identities} {tokenizer.identity()}'
  name = hashlib.sha256(key.encode()).hexdigest()[:32]
  folder = selection.cache / 'tokenizers' / name
  path = prepared(folder, write, url=selection.url('tokenizers', name))
  return Fitted(load_tokenizer(path / 'tokenizer.json'))


def load(
  mixture: MixtureOptions,
  task: TaskOptions,
  tokenizer: TokenizerOptions,
  selection: Selection,
  shape: RowShape,
) -> MixedDataset:
  """The dataset of a mixture, each source tokenized unless it is in the cache.

  One tokenizer serves all sources; if it depends on texts, it is fitted to the
  texts of all sources.

  Raises:
    ValueError: As `TaskOptions.load`, with the name of the source; or the
      period is too short for a weight.
    NotPreparedError: A source is missing in the cache within `reading_only`.
  """
  tokenizer = shared_tokenizer(mixture.sources, task, tokenizer, selection)
  parts = {}
  # A config keeps no order, and a run must be the same when it is read again.
  for number, (name, source) in enumerate(sorted(mixture.sources.items())):
    try:
      part = task.load(source, tokenizer, selection, shape)
    except NotPreparedError:
      raise
    except InputError as error:
      raise InputError(f'mixture.sources.{name}: {error}') from error
    splits = {s: TaskRows(rows, number) for s, rows in part.splits.items()}
    parts[name] = dataclasses.replace(part, splits=splits)
  sizes = {name: len(parts[name].splits['train']) for name in mixture.learned()}
  per_period = whole_counts(mixture.shares(sizes), mixture.period)
  learned = [parts[name] for name in per_period]
  schedule = Schedule(np.array([*per_period.values()]))
  digests = ''.join(f'{name} {part.digest}\n' for name, part in parts.items())
  return MixedDataset(
    source=f'mixture of {len(learned)} sources',
    tokenizer=learned[0].tokenizer,
    splits={
      split: MixedRows(
        {n: parts[n].splits[split] for n in per_period}, schedule
      )
      for split in SPLITS
    },
    digest=hashlib.sha256(digests.encode()).hexdigest(),
    counts={
      split: {
        key: sum(part.counts[split][key] for part in learned)
        for key in learned[0].counts[split]
      }
      for split in SPLITS
    },
    task=task,
    parts=parts,
    clusters={name: mixture.cluster(name) for name in parts},
    per_period=per_period,
  )
