"""Mixtures of sources: their options, and the text form of their sources.

The rules of weights are those of T5 (https://arxiv.org/abs/1910.10683, section
3.5.2).
"""

import ast
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax import config
from moe_jax.data.contracts import SourceOptions
from moe_jax.data.sources import SOURCES
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
_COMMENT = re.compile(r'^\s*#.*$', re.MULTILINE)
_QUOTED = re.compile('"[^"]*"|\'[^\']*\'')
# Names that evaluations of every source give to means over sources.
_MEANS = ('mean', 'cluster_mean', 'held_out_mean', 'held_out_cluster_mean')


@dataclasses.dataclass(frozen=True)
class MixtureOptions(config.Options):
  """The sources of a mixture, and how often a run sees each of them."""

  sources: Mapping[str, SourceOptions] = config.entries(
    SOURCES,
    {},
    'Kind of a source of the mixture. Each entry of `sources` is a source, '
    'with a name that the user chooses; without an entry, data.source is the '
    'only source.',
  )
  lines: str = config.option(
    '',
    "Sources and weights that are added as text, 'books:files(books/*.txt)*2, "
    "code:files(code/*.gz)': a name, a kind, its options and a weight each; "
    'empty adds none.',
  )
  rule: str = config.option(
    'proportional',
    "Rule of the weights: 'proportional' to the number of training rows up to "
    "mixture.cap, its root by 'temperature', or 'given' by mixture.weights.",
    choices=('proportional', 'temperature', 'given'),
  )
  cap: int = config.option(
    0,
    'Number of rows above which a source counts as having no more, as in the '
    'examples-proportional mixing of T5; 0 sets no limit.',
    minimum=0,
  )
  temperature: float = config.option(
    2.0,
    'Temperature T of the weights, which are the numbers of rows to the power '
    '1/T; 1 is proportional, a large one makes all weights equal.',
    minimum=1,
  )
  weights: Mapping[str, float] = config.option(
    {},
    'Weight of each source by name, relative to the others; a source without '
    'one has the weight 1, and with 0 it is only evaluated.',
  )
  held_out: str = config.option(
    '',
    'Names of sources or of clusters of sources that are evaluated but not '
    'learned from, separated by commas; an empty text holds out none.',
  )
  period: int = config.option(
    1000,
    'Number of rows after which every source has been seen exactly as often as '
    'its weight says, rounded to whole rows by largest remainders.',
    minimum=1,
  )

  def __post_init__(self):
    """Turns `lines` into sources and weights, and checks all options."""
    for name, value in self.spelled_out(vars(self)).items():
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
    usual_rule = config.fields_of(cls)['rule'].default
    rule = section.get('rule', usual_rule)
    for entry in _split(text, ',\n'):
      try:
        name, source, weight = _read_entry(entry)
        if name in sources:
          raise InputError(f'there is a source {name!r} already')
      except InputError as error:
        raise config.OptionError([f'lines: entry {entry!r}: {error}']) from None
      sources[name] = source
      if weight is not None:
        weights[name] = weight
        rule = 'given' if rule == usual_rule else rule
    changes = {'sources': sources, 'weights': weights, 'rule': rule}
    return {**section, **changes, 'lines': ''}

  def problems(self) -> Iterator[str]:
    """Yields a text for each problem of the sources' names and weights."""
    if not self.sources:
      yield from self.in_vain('without sources')
      return
    if self.rule == 'given':
      yield from self.in_vain("with rule='given'", 'cap')
    else:
      yield from self.in_vain("unless rule is 'given'", 'weights')
    if self.rule != 'temperature':
      yield from self.in_vain("unless rule is 'temperature'", 'temperature')
    for name in sorted({*_MEANS} & self.sources.keys()):
      yield (
        f'sources.{name}: {list(_MEANS)} are names of means over sources in '
        'evaluations; give the source another name'
      )
    for name, weight in self.weights.items():
      if name not in self.sources:
        yield f'weights: {config.unknown_text("source", name, self.sources)}'
      elif self.is_held_out(name) and weight not in (0, 1):
        yield (
          f'weights.{name}={weight!r} has no effect, since '
          f'held_out={self.held_out!r} holds the source out'
        )
      if not config.of_type(weight, float) or not 0 <= weight < float('inf'):
        yield f'weights.{name}={weight!r} is no number of at least 0'
    names = {*self.sources, *map(self.cluster, self.sources)}
    for name in self._held_out():
      if name not in names:
        text = config.unknown_text('source or cluster', name, names)
        yield f'held_out: {text}'
    if not self.learned():
      weights = f' with weights={dict(self.weights)}' * bool(self.weights)
      yield f'held_out={self.held_out!r}{weights} leaves none to learn from'

  def cluster(self, name: str) -> str:
    """The name of a source's cluster, a group of similar sources.

    A source without a cluster is a cluster by itself, under its own name.
    """
    return self.sources[name].cluster or name

  def is_held_out(self, name: str) -> bool:
    """Whether the option `held_out` names a source or its cluster."""
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
    """This mixture for a small run: `embedded` replaces sources of files.

    Sources that are held out stay held out.
    """
    sources = {
      name: source.shrunk() if source.is_embedded else embedded
      for name, source in self.sources.items()
    }
    held_out = ','.join(n for n in self.sources if self.is_held_out(n))
    return dataclasses.replace(self, sources=sources, held_out=held_out)

  def _held_out(self) -> list[str]:
    return [name.strip() for name in self.held_out.split(',') if name.strip()]


def _read_entry(entry: str) -> tuple[str, SourceOptions, float | None]:
  """Reads the text of a source in `lines`: its name, options and weight.

  The weight is None if none is given. A wrong text raises a ValueError.
  """
  match = _ENTRY.fullmatch(entry)
  if match is None:
    raise InputError(f'it is not of the form {_FORM}')
  name, kind, options, weight = match.groups()
  cls, values = SOURCES.get(kind), {}
  fields = config.fields_of(cls)
  required = [n for n in fields if fields[n].default is dataclasses.MISSING]
  unnamed = next(iter([*required, *fields]), '')
  for number, text in enumerate(_split(options or '', ',')):
    pair = _PAIR.fullmatch(text)
    if pair is None and number:
      raise InputError(f'option {text!r} has no name; {_FORM}')
    key, value = pair.groups() if pair else (unnamed, text)
    if key not in fields:
      raise InputError(config.unknown_text(f'option of {kind}', key, fields))
    value = value.strip()
    if fields[key].type is not str or value[:1] in ('"', "'"):
      # A text that is no value is refused by the option.
      with contextlib.suppress(SyntaxError, ValueError):
        value = ast.literal_eval(value)
    values[key] = value
  for key in required:
    if key not in values:
      raise InputError(f'option {key!r} of {kind} is missing')
  try:
    number = None if weight is None else float(weight)
  except ValueError:
    raise InputError(f'weight {weight!r} is no number') from None
  return name, cls(**values), number


def _split(text: str, separators: str) -> list[str]:
  """Splits a text at characters of `separators` outside brackets and quotes.

  Empty parts, and comments (lines that begin with '#'), are left out.

  Raises:
    OptionError: A bracket or quote is not closed.
  """
  parts, part = [], ''
  for piece in re.split(f'([{separators}])', _COMMENT.sub('', text)):
    part += piece
    bare = _QUOTED.sub('', part)
    if bare.count('(') == bare.count(')') and not set(bare) & {'"', "'"}:
      parts.append(part.strip())
      part = ''
  if part:
    where = f'lines: {part.strip()!r:.80}'
    raise config.OptionError([f'{where} has an open bracket or quote'])
  return [part for part in parts if part and part not in separators]
