"""The routing report: tables of the loads and choices in each sparse layer.

The numbers are computed from sums over the batches of an evaluation.
"""

import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Num
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_jax.devices import fetch
from moe_jax.models import Model
from moe_jax.models.recorded import Choices
from moe_jax.runs import summary
from moe_jax.runs.summary import LossSums

Row = dict[str, Any]
Counts = dict[int, Num[np.ndarray, 'V E']]

_BY_CHOICE = 'drop_rate_choice_'
_NUM_BUSIEST, _NUM_TOKENS = 3, 6  # experts of a layer, tokens of each
_LAYERS_NOTE = (
  'Every token chooses one or more experts; a choice is dropped if its expert '
  'is full. The load of an expert is the number of choices that fall on it, '
  'before any is dropped. The entropy is that of the router over experts, '
  'averaged over tokens; one that is undecided among all has ln E.'
)
_TOKENS_NOTE = (
  'Choices are counted before any is dropped. The share of an expert is its '
  'part of all choices; the percentage behind a token is the part of that '
  "token's own choices that fall on this expert."
)


class ValueTable(NamedTuple):
  """A table whose values are printed by a format for each column.

  Attributes:
    title: One line that says what the table shows.
    note: Sentences that say what the columns mean.
    rows: The values of each row, by the name of the column; None, NaN and what
      is missing are printed as '-'.
    forms: The formats of columns, such as '.1%', or '>', which aligns text
      right. Other columns have a format by the type of their values.
  """

  title: str
  note: str
  rows: Sequence[Row]
  forms: Mapping[str, str] = {}

  @property
  def columns(self) -> dict[str, str]:
    """The format of each column that some row has, by the column's name."""
    by_type = {int: ',d', float: '.3f', str: ''}
    return {
      name: self.forms.get(name) or by_type[type(value)]
      for row in self.rows
      for name, value in row.items()
    }

  def cells(self) -> list[list[str]]:
    """The table's rows as texts; the first has the names of columns."""
    columns = self.columns
    cells = [[name.replace('_', ' ') for name in columns]]
    for row in self.rows:
      values = [(row.get(name), form) for name, form in columns.items()]
      cells.append(
        ['-' if x is None or x != x else format(x, form) for x, form in values]
      )
    return cells

  def markdown(self) -> str:
    """The title, the note and the table in GitHub's Markdown."""
    rules = ['---:' if form else ':---' for form in self.columns.values()]
    headings, *rows = self.cells()
    rows = [[text.replace('|', r'\|') for text in row] for row in rows]
    lines = [f'| {" | ".join(row)} |' for row in [headings, rules, *rows]]
    return '\n'.join([f'## {self.title}', '', self.note, '', *lines]) + '\n'

  def terminal(self) -> Table:
    """The table as rich prints it on a terminal."""
    headings, *rows = self.cells()
    table = Table(*headings, title=self.title, box=box.SIMPLE_HEAD)
    table.title_justify, table.padding = 'left', (0, 1, 0, 0)
    for column, form in zip(table.columns, self.columns.values()):
      column.justify = 'right' if form else 'left'
    for cells in rows:
      # Cells are Text, since rich would read markup in a token's name.
      table.add_row(*map(Text, cells))
    return table

  def show(self, console: Console) -> None:
    """Prints the table and its note on a console."""
    console.print(self.terminal())
    console.print(f'{self.note}\n', highlight=False)


def wide_console() -> Console:
  """A console for standard output.

  If standard output is no terminal, as in a pipe, tables are as wide as they
  need, unless the environment variable COLUMNS is set.
  """
  console = Console()
  if not console.is_terminal and 'COLUMNS' not in os.environ:
    console.width = 1000
  return console


def count_tokens(
  counts: Counts, model: Model, batch: Mapping[str, Any], choices: Choices
) -> None:
  """Adds how often each token id of a batch chose each expert, before drops.

  The numbers are added to `counts`, by layer; `choices` are those of the batch.
  Where experts choose tokens, this is how often an expert took the token id;
  where experts mix tokens, every expert takes every token. Every process has to
  call this function.
  """
  for layer, recorded in (choices or {}).items():
    ids = fetch(batch[f'{model.stacks.sequence_of(layer)}tokens'])
    expert = fetch(recorded.expert)
    is_choice = expert >= 0
    token = np.broadcast_to(ids[..., None], expert.shape)
    shape = model.vocab_size, model.stacks.moe_of(layer).num_experts
    table = counts.setdefault(layer, np.zeros(shape, int))
    np.add.at(table, (token[is_choice], expert[is_choice]), 1)


def tables(
  sums: LossSums, model: Model, counts: Counts, token_name: Callable[[int], str]
) -> list[ValueTable]:
  """A table of the sparse layers, and a table of their busiest experts.

  Of experts or tokens with equal counts, the lower index comes first.

  Args:
    sums: The sums of an evaluation.
    model: The model.
    counts: Number of times that each token id chose each expert, by layer.
    token_name: The function from a token id to the name that is shown for it.
  """
  layers, busiest, K = [], [], sums.aux.stats.overflowed.shape[-1]
  for layer in summary.sparse_layers(sums):
    values = summary.layer_summary(sums, layer, model.stacks.moes)
    load = np.asarray(sums.aux.stats.load[layer][: len(values['load'])])
    most, unused = math.log(len(load)), values['unused_experts']
    rates = [x for name, x in values.items() if name.startswith(_BY_CHOICE)]
    rates = [*(rates or [values['drop_rate']]), *[None] * K][:K]
    row = {
      'layer': layer,
      'dropped': values['drop_rate'],
      **{f'choice {k}': rate for k, rate in enumerate(rates, 1)},
      'load max / mean': values['load_max_over_mean'],
      'load CV': values['load_cv'],
      'entropy (nats)': values['entropy'],
      'entropy / ln E': values['entropy'] / most if most else math.nan,
      'logit RMS': values['router_logit_rms'],
      'unused experts': f'{unused} of {len(load)}',
    }
    layers.append(row)
    for expert in _largest(load, _NUM_BUSIEST):
      count = counts[layer][:, expert]
      ids = _largest(count, _NUM_TOKENS)
      shares = {i: count[i] / counts[layer][i].sum() for i in ids}
      texts = [f'{_shown(token_name(i))} {x:.0%}' for i, x in shares.items()]
      share = float(load[expert] / load.sum())
      row = {'layer': layer, 'expert': expert, 'share': share}
      busiest.append(row | {'tokens, most frequent first': ', '.join(texts)})
  names = 'dropped', *(f'choice {k}' for k in range(1, K + 1))
  forms = dict.fromkeys(names, '.1%') | {'unused experts': '>'}
  forms |= {'load max / mean': '.2f', 'logit RMS': '.2f'}
  title = 'What the router of each sparse layer did'
  busy_title = 'Which tokens the busiest experts take'
  return [
    ValueTable(title, _LAYERS_NOTE, layers, forms),
    ValueTable(busy_title, _TOKENS_NOTE, busiest, {'share': '.0%'}),
  ]


def _largest(values: Num[np.ndarray, 'n'], at_most: int) -> list[int]:
  """Indices of the `at_most` largest values above 0; ties in order of index."""
  order = np.argsort(-values.astype(np.float64), kind='stable')[:at_most]
  return [int(index) for index in order if values[index] > 0]


def _shown(name: str) -> str:
  r"""A token's name as Markdown code; a space is `␣`, a line's end `\n`."""
  text = ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode()
    for c in name.replace(' ', '␣') or "''"
  )
  # The fence of a span is longer than any run of backticks within.
  runs = [len(run) for run in re.findall('`+', text)]
  fence = '`' * (1 + max(runs, default=0))
  return f'{fence} {text} {fence}' if runs else f'{fence}{text}{fence}'


def write_report(
  workdir: pathlib.Path, report: Sequence[ValueTable], warning: str = ''
) -> None:
  """Writes `routing_report.md` into a folder; a warning stands on top."""
  parts = ['# Routing report\n']
  parts += [f'**Warning:** {warning}.\n'] if warning else []
  parts += [table.markdown() for table in report]
  path = workdir / 'routing_report.md'
  path.write_text('\n'.join(parts), encoding='utf-8')
