"""The routing report: tables of the loads and choices in each sparse layer.

Its numbers are sums over the batches of an evaluation.
"""

import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Num
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_jax.devices import fetch
from moe_jax.models import Model
from moe_jax.models.recorded import LayerChoices
from moe_jax.routing import drop_rate
from moe_jax.routing.stats import load_summary
from moe_jax.runs import summary
from moe_jax.runs.summary import LossSums

Value = str | int | float | None
Row = dict[str, Any]
Counts = dict[int, Num[np.ndarray, 'V E']]

_NUM_BUSIEST, _NUM_TOKENS = 3, 6  # the most experts, and tokens for each
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
    title: One line that says what it shows.
    note: Sentences that say what the columns mean.
    columns: The format of each column by its heading, such as '.3f' or '.1%';
      '' aligns text left, '>' aligns it right.
    rows: The values of each row; None and NaN are printed as '-'.
  """

  title: str
  note: str
  columns: Mapping[str, str]
  rows: Sequence[Sequence[Value]]

  def cells(self) -> list[list[str]]:
    """The text of each cell, row by row."""
    forms = self.columns.values()
    return [
      ['-' if x is None or x != x else format(x, f) for x, f in zip(row, forms)]
      for row in self.rows
    ]

  def markdown(self) -> str:
    """Title, note and table in GitHub's Markdown."""
    rules = ['---:' if form else ':---' for form in self.columns.values()]
    cells = [[c.replace('|', r'\|') for c in row] for row in self.cells()]
    lines = [f'| {" | ".join(c)} |' for c in [[*self.columns], rules, *cells]]
    return '\n'.join([f'## {self.title}', '', self.note, '', *lines]) + '\n'

  def terminal(self) -> Table:
    """The table for a terminal."""
    table = Table(
      title=self.title,
      title_justify='left',
      box=box.SIMPLE_HEAD,
      padding=(0, 1, 0, 0),
    )
    for heading, form in self.columns.items():
      table.add_column(heading, justify='right' if form else 'left')
    for cells in self.cells():
      # Cells are Text, since rich would read markup in a token's name.
      table.add_row(*map(Text, cells))
    return table


def wide_console() -> Console:
  """A console for standard output.

  Where that is no terminal, as in a pipe, tables have all the columns that they
  need, unless COLUMNS is set.
  """
  console = Console()
  if not console.is_terminal and 'COLUMNS' not in os.environ:
    console.width = 1000
  return console


def no_counts(model: Model) -> Counts:
  """Zeros for each sparse layer, to which `count_tokens` adds."""
  return {
    layer: np.zeros((model.vocab_size, moe.num_experts), int)
    for layer, moe in enumerate(model.stacks.moes)
    if moe is not None
  }


def count_tokens(
  counts: Counts,
  model: Model,
  batch: Mapping[str, Any],
  choices: Mapping[int, LayerChoices],
) -> None:
  """Adds how often each token id of a batch chose each expert, before drops.

  Where experts choose tokens, it is how often they took them; where they mix
  them, every expert takes each. Every process has to call this.
  """
  stacks = model.stacks
  for layer, recorded in choices.items():
    ids = fetch(batch[f'{stacks.sequence_of(layer)}tokens'])
    expert = fetch(recorded.expert)
    is_choice = expert >= 0
    token = np.broadcast_to(ids[..., None], expert.shape)
    np.add.at(counts[layer], (token[is_choice], expert[is_choice]), 1)


def tables(
  sums: LossSums, model: Model, counts: Counts, token_name: Callable[[int], str]
) -> list[ValueTable]:
  """A table of layers, and one of their busiest experts.

  Ties go to the lower number.

  Args:
    sums: The sums of an evaluation.
    model: The model.
    counts: Number of times that each token id chose each expert, by layer.
    token_name: The function from a token id to the name that is shown for it.
  """
  numbers = summary.sparse_layers(sums)
  stats, drops = {}, {}
  for layer in numbers:
    own = jax.tree.map(lambda leaf, i=layer: leaf[i], sums.aux.stats)
    stats[layer] = summary.of_layer(own, layer, model.stacks.moes)
    drops[layer] = drop_rate(stats[layer])
  K = max(len(by_choice) for by_choice, _ in drops.values())
  columns = {
    'layer': 'd', 'dropped': '.1%',
    **{f'choice {k + 1}': '.1%' for k in range(K)},
    'load max / mean': '.2f', 'load CV': '.3f', 'entropy (nats)': '.3f',
    'entropy / ln E': '.3f', 'logit RMS': '.2f', 'unused experts': '>',
  }  # fmt: skip
  rows, busy_rows = [], []
  for layer in numbers:
    own, (by_choice, overall) = stats[layer], drops[layer]
    load, entropy = np.asarray(own.load), float(own.entropy / own.tokens)
    of_load, most = load_summary(load), math.log(len(load))
    rates = [*map(float, by_choice)]
    rows.append(
      [
        layer,
        float(overall),
        *rates,
        *[None] * (K - len(rates)),
        of_load['load_max_over_mean'],
        of_load['load_cv'],
        entropy,
        entropy / most if most else None,
        math.sqrt(own.logit_square / own.tokens),
        f'{of_load["unused_experts"]} of {len(load)}',
      ]
    )
    for expert in _largest(load, _NUM_BUSIEST):
      count = counts[layer][:, expert]
      ids = _largest(count, _NUM_TOKENS)
      shares = {i: count[i] / counts[layer][i].sum() for i in ids}
      texts = [f'{_shown(token_name(i))} {x:.0%}' for i, x in shares.items()]
      share = float(load[expert] / load.sum())
      busy_rows.append([layer, expert, share, ', '.join(texts)])
  tokens_columns = {'layer': 'd', 'expert': 'd', 'share': '.0%'}
  tokens_columns['tokens, most frequent first'] = ''
  return [
    ValueTable(
      'What the router of each sparse layer did', _LAYERS_NOTE, columns, rows
    ),
    ValueTable(
      'Which tokens the busiest experts take',
      _TOKENS_NOTE,
      tokens_columns,
      busy_rows,
    ),
  ]


def _largest(values: Num[np.ndarray, 'n'], at_most: int) -> list[int]:
  """Indices of the largest values above 0; ties go to the lower index."""
  order = np.argsort(-values.astype(np.float64), kind='stable')[:at_most]
  return [int(index) for index in order if values[index] > 0]


def _shown(name: str) -> str:
  r"""A name as a code span, with `␣` for a space and `\n` for a line's end."""
  text = ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode()
    for c in name.replace(' ', '␣') or "''"
  )
  # The fence of a span is longer than any run of backticks within.
  runs = [len(run) for run in re.findall('`+', text)]
  fence = '`' * (1 + max(runs, default=0))
  return f'{fence} {text} {fence}' if runs else f'{fence}{text}{fence}'


def write_report(
  workdir: str | os.PathLike[str],
  report: Sequence[ValueTable],
  warning: str = '',
) -> None:
  """Writes `routing_report.md` into a folder; a warning stands on top."""
  parts = [
    '# Routing report\n',
    *[f'**Warning:** {warning}.\n'] * bool(warning),
  ]
  parts += [table.markdown() for table in report]
  path = pathlib.Path(workdir) / 'routing_report.md'
  path.write_text('\n'.join(parts), encoding='utf-8')
