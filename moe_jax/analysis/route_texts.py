"""The text of a trace in the colours of its experts, layer by layer.

Not here: how a text is coloured (`coloured_text.py`).
"""

import pathlib
from collections.abc import Container, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moe_jax.analysis import coloured_text, route_counts
from moe_jax.analysis.route_sections import Section
from moe_jax.analysis.trace_records import Header, Record
from moe_jax.analysis.traces import Trace
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import TextStream, Tokenizer
from moe_jax.errors import InputError
from moe_jax.runs import workdir

_MAX_TOKENS = 600  # of each sequence, on a page
_COLOUR_NOTE = (
  'Each token has the colour and the number of the expert that it chose first, '
  'before drops. Colours repeat after eight experts; numbers do not. \u21b5 is '
  'the end of a line, and \u00b7 a token without text, such as the end of a '
  'document or a part of a character. Each row of the batch is a box. Compare '
  'layers: do spaces, names or the beginnings of lines keep one expert?'
)


class RowText(NamedTuple):
  """The real tokens of one row of a batch, without padding.

  Attributes:
    texts: The text of each of N tokens.
    experts: The first choice of each, int [N], by the number of the layer; -1
      where there is none.
  """

  texts: list[str]
  experts: dict[int, Int[np.ndarray, ' N']]


def read_row(
  header: Header,
  record: Record,
  row: int = 0,
  *,
  tokenizer: Tokenizer | None,
  most: int | None = None,
) -> RowText:
  """The text of a row of a batch, and the expert that each token chose first.

  Where experts choose, it is the one with the largest gate.

  Args:
    header: The header of the trace.
    record: The batch.
    row: The number of the row.
    tokenizer: The tokenizer of the run; None gives ids.
    most: The most tokens; None: all.
  """
  columns = np.flatnonzero(record.documents[row] > 0)[:most]
  experts = {}
  for number, choices in record.layers.items():
    expert, gate, kept = (values[row, columns] for values in choices[:3])
    if header.layers[number].by_expert:
      expert, *_ = route_counts.by_gate(expert, gate, kept)
    experts[number] = expert[:, 0]
  return RowText(_texts(record.tokens[row, columns], tokenizer), experts)


def _texts(ids: np.ndarray, tokenizer: Tokenizer | None) -> list[str]:
  if tokenizer is None or not len(ids):
    return [f'{number} ' for number in ids]
  stream = TextStream(tokenizer)
  texts = [stream.add(number) for number in ids]
  texts[-1] += stream.end()
  return [''.join(map(_printable, text)) for text in texts]


def _printable(character: str) -> str:
  """The character, or one that stands for it where a page cannot have it."""
  return (
    character if character.isprintable() or character in '\n\t' else '\ufffd'
  )


def find_tokenizer(
  trace: str, header: Header, run: str = ''
) -> tuple[Tokenizer | None, str]:
  """The tokenizer of the run that a trace is of, and why there is none.

  Args:
    trace: The folder of the trace.
    header: Its header.
    run: The folder of the run; '' takes the folder that the trace is in.

  Returns:
    The tokenizer, or None and a sentence; the sentence is '' where there is
    one.

  Raises:
    ValueError: A run is given, and has no tokenizer or that of another trace.
  """
  folder = pathlib.Path(run or pathlib.Path(trace).expanduser().parent)
  path = folder.expanduser() / workdir.TOKENIZER
  try:
    if not path.exists():
      raise InputError(f'there is no {path}')
    tokenizer = tokenizers.load(path)
    if header.tokenizer and tokenizer.identity != header.tokenizer:
      raise InputError(
        f'{path} is {tokenizer.identity}, the trace is of {header.tokenizer}'
      )
  except InputError as error:
    if run:
      raise
    return None, (
      f'Tokens are shown by their ids, as the tokenizer is not known: {error}. '
      'A --workdir of the run gives it.'
    )
  return tokenizer, ''


def section(
  trace: Trace,
  kind: str,
  steps: Container[int],
  tokenizer: Tokenizer | None,
  note: str = '',
) -> Section | None:
  """The section with a text in the colours of each layer's experts.

  Args:
    trace: The trace.
    kind: The kind of records.
    steps: The numbers of steps, of which the last is shown.
    tokenizer: The tokenizer of the run; None shows ids.
    note: A sentence that is added; may be empty.

  Returns:
    None where there is no real token, or where examples are no text.
  """
  if tokenizer is not None and tokenizer.feature_shape:
    return None
  last = max(step for step in trace.steps_of(kind) if step in steps)
  texts = {
    number: html
    for record in _first_records(trace, kind, last)
    for number, html in _pages(trace.header, record, tokenizer)
  }
  if not texts:
    return None
  extent = (
    f'The text is the first {_MAX_TOKENS} tokens at most of {kind!r} at step'
  )
  return Section(
    'text',
    'Text in the colours of its experts',
    [f'{extent} {last:,}. {_COLOUR_NOTE}', *filter(None, [note])],
    {},
    [],
    {f'Layer {number}': texts[number] for number in sorted(texts)},
  )


def _first_records(trace: Trace, kind: str, step: int) -> Iterator[Record]:
  """The first batch of a step, for each of a model's sequences."""
  batch = None
  for record in trace.records(kind, [step]):
    batch = record.batch if batch is None else batch
    if record.batch != batch:
      return
    yield record


def _pages(
  header: Header, record: Record, tokenizer: Tokenizer | None
) -> Iterator[tuple[int, str]]:
  """The number and the HTML of each layer: its first rows, a box for each."""
  row_texts, num_left = [], _MAX_TOKENS
  for row in range(len(record.tokens)):
    row_text = read_row(header, record, row, tokenizer=tokenizer, most=num_left)
    num_left -= len(row_text.texts)
    row_texts += [row_text] if row_text.texts else []
  for number in record.layers if row_texts else []:
    row_pages = (
      coloured_text.page(r.texts, r.experts[number]) for r in row_texts
    )
    yield number, '\n'.join(row_pages)
