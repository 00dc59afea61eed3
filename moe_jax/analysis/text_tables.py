"""Tables of values, as Markdown and on a terminal."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_jax.errors import InputError

Value = str | int | float | None
_WIDE = 1000  # columns, enough for every table


@dataclasses.dataclass(frozen=True)
class ValueTable:
  """A table whose values are printed by a format for each column.

  Attributes:
    name: The name of its file, without a suffix.
    title: One line that says what it shows.
    note: Sentences that say what the columns mean; may be empty.
    columns: The format of each column by its heading, such as '.3f' or '.1%';
      '' aligns text left, '>' aligns it right.
    rows: The values of each row; None and NaN are printed as '-'.
  """

  name: str
  title: str
  note: str
  columns: Mapping[str, str]
  rows: Sequence[Sequence[Value]]

  def __post_init__(self):
    """Raises ValueError where a row has not one value for each column."""
    for row in self.rows:
      if len(row) != len(self.columns):
        raise InputError(
          f'table {self.name!r}: {len(row)} values for the columns '
          f'{list(self.columns)}'
        )

  @property
  def left(self) -> list[str]:
    """The headings of columns that are aligned left."""
    return [heading for heading, form in self.columns.items() if not form]

  def cells(self) -> list[list[str]]:
    """The text of each cell, row by row."""
    forms = self.columns.values()
    return [
      [_text(value, form) for value, form in zip(row, forms, strict=True)]
      for row in self.rows
    ]

  def markdown(self) -> str:
    """Title, note and table in GitHub's Markdown."""
    rules = ['---:' if form else ':---' for form in self.columns.values()]
    cells = [[c.replace('|', r'\|') for c in row] for row in self.cells()]
    lines = [f'| {" | ".join(c)} |' for c in [[*self.columns], rules, *cells]]
    note = [self.note, ''] if self.note else []
    return '\n'.join([f'## {self.title}', '', *note, *lines]) + '\n'

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
    console.width = _WIDE
  return console


def _is_missing(value: Value) -> bool:
  return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Value, form: str) -> str:
  return '-' if _is_missing(value) else format(value, form)
