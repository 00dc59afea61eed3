"""Reads the published numbers that studies are compared to, `claims.json`.

A cell's address is its path in the file, 'paper/table/row/column', such as
'shazeer2017/table6/(0.0, 0.0)/max_over_mean'. Every cell has a mark:

- checked: read in the paper, or in public reference code;
- secondary: from a summary, a survey or a blog, and cited as such;
- unverified: not found in the paper. It tells a reader that a number is
  missing, and no text made here shows it.

In the file a column is its unit and the better direction, and a row is a list
of cells in the order of the columns. A cell is a number; null, where nothing is
printed; text such as '~42' or '<=30', where the paper gives no exact number; or
an object of a value and the fields that differ from those of column and table.
Errors in a paper are kept, with a note.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.config import unknown
from moe_jax.errors import InputError

CLAIMS = pathlib.Path(__file__).with_name('claims.json')
MARKS = ('checked', 'secondary', 'unverified')
BETTER = ('lower', 'higher', None)
HIDDEN = 'unverified, not shown'
_SECONDARY = ', secondary source'
_ROUGHLY = re.compile(r'(~|[<>]=?)(-?\d+(?:\.\d+)?)')


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class Published:
  """One number of a paper; `repr` and `str` include the text of `cite`.

  Attributes:
    address: Path of the number in the file, 'paper/table/row/column'.
    table: The paper's name of the table, or another source of the number in the
      paper: 'text', 'abstract'.
    value: The number.
    relation: Relation of the true number to `value`: '' where they are equal,
      or '~', '<', '<=', '>' or '>='.
    unit: Unit of the number: '%', 'nats/token', 'x' (a ratio), 'B parameters'.
    better: Direction of better numbers, 'lower' or 'higher'; None for neither.
    mark: Degree to which the number was verified, one of `MARKS`.
    note: Warning that is printed with the number, or ''.

  Raises:
    ValueError: The value is not finite, there is no unit, or the mark or the
      direction is unknown.
  """

  address: str
  table: str
  value: float
  relation: str = ''
  unit: str = ''
  better: str | None = None
  mark: str
  note: str = ''

  def __post_init__(self):
    if type(self.value) not in (int, float) or not math.isfinite(self.value):
      raise InputError(f'{self.address}: {self.value!r} is no finite number')
    if not self.unit:
      raise InputError(f'{self.address}: no unit')
    if self.mark not in MARKS:
      raise unknown(f'mark of {self.address}:', self.mark, MARKS)
    if self.better not in BETTER:
      raise unknown(f'direction of {self.address}:', self.better, BETTER)

  def cite(self) -> str:
    """The number and its source as a report prints them.

    The text of an unverified number does not contain it.
    """
    if self.mark == 'unverified':
      return HIDDEN
    source = _SECONDARY if self.mark == 'secondary' else ''
    note = f'; {self.note}' if self.note else ''
    return f'{self.relation}{self.value} ({self.table}{source}{note})'

  def __repr__(self) -> str:
    return f'<{self.address}: {self.cite()}>'


@functools.cache
def load(path: pathlib.Path = CLAIMS) -> Mapping[str, Published]:
  """Every published number by its address, in the file's order.

  Raises:
    ValueError: The file breaks a rule of this module; the message names the
      cell.
  """
  # Objects are read as pairs: a dict would hide a name that is given twice.
  text = path.read_text(encoding='utf-8')
  papers = json.loads(text, object_pairs_hook=tuple)
  cells = {}
  for slug, paper in _object(papers, path.name).items():
    paper = _object(paper, slug, ('title', 'url', 'year', 'tables'))
    for name, table in _object(paper['tables'], slug).items():
      for cell in _cells(f'{slug}/{name}', table):
        cells[cell.address] = cell
  return types.MappingProxyType(cells)


def find(address: str) -> Published:
  """The published number at an address, 'paper/table/row/column'.

  Raises:
    ValueError: There is no such number; the message names the part of the path
      that is wrong, and what exists there.
  """
  if address in load():
    return load()[address]
  known_paths = [name.split('/') for name in load()]
  for depth, part in enumerate([*address.split('/'), '']):
    choices = {x for names in known_paths for x in names[depth : depth + 1]}
    if part not in choices:
      break
    known_paths = [names for names in known_paths if names[depth] == part]
  raise unknown(f'part of {address!r}:', part, choices)


def is_checked(citation: str) -> bool:
  """Whether a text that `Published.cite` made is of a checked number."""
  return citation != HIDDEN and _SECONDARY not in citation


def _cells(where: str, table: Any) -> Iterator[Published]:
  """The numbers of one table; a cell's own fields override its column's."""
  needs = ('table', 'mark', 'about', 'columns', 'rows')
  table = _object(table, where, needs, optional=('note',))
  columns = _object(table['columns'], where)
  for row, values in _object(table['rows'], where).items():
    if not isinstance(values, list) or len(values) != len(columns):
      raise InputError(f'{where}/{row}: {values} for columns {[*columns]}')
    for column, value in zip(columns, values, strict=True):
      if value is None:
        continue
      address = f'{where}/{row}/{column}'
      fields = {
        'address': address,
        'table': table['table'],
        'mark': table['mark'],
        **dict(zip(('unit', 'better'), columns[column], strict=False)),
        **_cell(value, address),
      }
      notes = filter(None, (fields.get('note'), table.get('note')))
      yield Published(**fields | {'note': '; '.join(notes)})


def _cell(value: Any, address: str) -> dict[str, Any]:
  """The fields that a cell itself gives, rather than its column or table."""
  fields = {'value': value}
  if isinstance(value, tuple):
    own = 'unit', 'better', 'mark', 'note'
    fields = _object(value, address, ('value',), own)
  if isinstance(fields['value'], str):
    if not (match := _ROUGHLY.fullmatch(fields['value'])):
      raise InputError(
        f"{address}: {fields['value']!r} is not like '~42', '<=3'"
      )
    fields |= {'relation': match[1], 'value': json.loads(match[2])}
  return fields


def _object(pairs: Any, address: str, needs=(), optional=()) -> dict[str, Any]:
  """A JSON object, read as pairs, as a dict.

  Args:
    pairs: The object's pairs.
    address: Address of the object in the file, for messages.
    needs: Keys that the object must have; with none any key is accepted.
    optional: Further keys that it may have.

  Raises:
    ValueError: It is no object, or a key is unknown, missing or given twice.
  """
  if not isinstance(pairs, tuple):
    raise InputError(f'{address}: {pairs!r} is no object')
  members = {}
  for key, value in pairs:
    if key in members:
      raise InputError(f'{address}/{key} stands twice')
    if '/' in key:
      raise InputError(f"{address}: {key!r} has a '/', which parts an address")
    if needs and key not in (*needs, *optional):
      raise unknown(f'key of {address}:', key, (*needs, *optional))
    members[key] = value
  if missing := [key for key in needs if key not in members]:
    raise InputError(f'{address} needs {missing}')
  return members
