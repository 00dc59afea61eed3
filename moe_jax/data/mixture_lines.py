"""Sources of a mixture as a line of text.

    books:files(books/*.jsonl, field=body)*2, code:files(code/*.py.gz)

An entry is a name, a kind, its options in brackets and a weight. The first
option needs no name where the kind has one that must be given (a pattern, a
path, the name of a dataset) or has options at all. Entries are separated by
commas or ends of lines, so that a file of lines can be given as it is; text
after a '#' at the beginning of a line is a comment. Text with a comma or
bracket of its own is quoted.
"""

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.errors import InputError
from moe_jax.options import (
  Kinds,
  OptionError,
  Options,
  default_of,
  fields_of,
  types_of,
  unknown,
)
from moe_jax.section_reader import KIND

_ENTRY = re.compile(
  r'(?P<name>[A-Za-z_]\w*)\s*:\s*(?P<kind>[\w.:]+)\s*'
  r'(?:\((?P<options>.*)\))?\s*(?:\*\s*(?P<weight>[\w.+-]+))?',
  re.DOTALL,
)
_FORM = 'name:kind(option, option=value)*weight'
_PAIR = re.compile(r'\s*([A-Za-z_]\w*)\s*=(.*)', re.DOTALL)


def spelled_out(
  section: Mapping[str, Any], kinds: Kinds, usual_rule: str
) -> Mapping[str, Any]:
  """The section of a mixture with its `lines` as entries of `sources`.

  Args:
    section: The section.
    kinds: The kinds of sources.
    usual_rule: The default of `rule`, which a weight in a line replaces by
      'given'.

  Raises:
    OptionError: An entry is wrong, or its name is taken; the message gives it.
  """
  text = section.get('lines', '')
  if not isinstance(text, str) or not text.strip():
    return section
  sources = dict(section.get('sources', {}))
  weights = dict(section.get('weights', {}))
  rule = section.get('rule', usual_rule)
  for entry in split(text, ',\n'):
    try:
      name, source, weight = read_entry(entry, kinds)
      if name in sources:
        raise InputError(f'there is a source {name!r} already')
    except InputError as error:
      raise OptionError([f'lines: entry {entry!r}: {error}']) from None
    sources[name] = source
    if weight is not None:
      weights[name] = weight
      rule = 'given' if rule == usual_rule else rule
  entries = {'sources': sources, 'weights': weights, 'rule': rule, 'lines': ''}
  return {**section, **entries}


def source_options(
  sources: Mapping[str, Options | Mapping[str, Any]], kinds: Kinds
) -> dict[str, Options]:
  """The options of all sources; some may still be sections.

  Raises:
    OptionError: An option is wrong.
  """
  return {
    name: source if isinstance(source, Options) else _options(source, kinds)
    for name, source in sources.items()
  }


def _options(section: Mapping[str, Any], kinds: Kinds) -> Options:
  options = {key: value for key, value in section.items() if key != KIND}
  return kinds.get(section[KIND])(**options)


def read_entry(
  entry: str, kinds: Kinds
) -> tuple[str, dict[str, Any], float | None]:
  """The name, the section and the weight of an entry; None without a weight.

  Raises:
    ValueError: The entry is not of the form, or a kind or option is unknown.
  """
  match = _ENTRY.fullmatch(entry)
  if match is None:
    raise InputError(f'it is not of the form {_FORM}')
  cls = kinds.get(match['kind'])
  source = {KIND: match['kind']}
  for number, option in enumerate(split(match['options'] or '', ',')):
    pair = _PAIR.fullmatch(option)
    if pair is None and number:
      raise InputError(f'option {option!r} has no name; {_FORM}')
    name, value = pair.groups() if pair else (_unnamed_option(cls), option)
    if name not in fields_of(cls):
      raise unknown(f'option of {match["kind"]}', name, fields_of(cls))
    source[name] = _value(value, types_of(cls)[name])
  missing = [name for name in _required(cls) if name not in source]
  if missing and cls in kinds.builtin.values():
    raise InputError(f'option {missing[0]!r} of {match["kind"]} is missing')
  weight = match['weight']
  try:
    return match['name'], source, None if weight is None else float(weight)
  except ValueError:
    raise InputError(f'weight {weight!r} is no number') from None


def split(text: str, separators: str) -> Iterator[str]:
  """The parts between separators that are in no brackets and no quotes.

  Empty parts and comments are left out.

  Raises:
    OptionError: A bracket or quote is not closed.
  """
  text = re.sub(r'^\s*#.*$', '', text, flags=re.MULTILINE)
  entry, depth, quote = '', 0, ''
  for letter in text:
    if quote:
      quote = '' if letter == quote else quote
    elif letter in '\'"':
      quote = letter
    elif letter in '()':
      depth += 1 if letter == '(' else -1
    if letter in separators and not depth and not quote:
      if entry.strip():
        yield entry.strip()
      entry = ''
    else:
      entry += letter
  if depth or quote:
    raise OptionError(
      [f'lines: {entry.strip()!r:.80} has an open bracket or quote']
    )
  if entry.strip():
    yield entry.strip()


def _unnamed_option(cls: type) -> str:
  """The option that needs no name: the first that must be given, or any."""
  name = next(iter([*_required(cls), *fields_of(cls)]), None)
  if name is None:
    raise InputError('the kind has no options')
  return name


def _required(cls: type) -> list[str]:
  return [
    name
    for name, field in fields_of(cls).items()
    if default_of(field) is dataclasses.MISSING
  ]


def _value(text: str, hint: Any) -> Any:
  """The value of an option, in the type of its field."""
  text = text.strip()
  if hint is str and text[:1] not in ('"', "'"):
    return text
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text  # refused where the options are read
