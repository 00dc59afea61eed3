"""Questions in a user's files, one JSON object in each line."""

import dataclasses
import pathlib
from collections.abc import Iterator

from moe_jax.data.choices.contract import (
  ChoiceSourceOptions,
  Item,
  ItemSource,
  check_item,
)
from moe_jax.data.plain_files import parse_json
from moe_jax.data.sources.contract import Selection
from moe_jax.data.sources.files import matching
from moe_jax.errors import InputError
from moe_jax.options import NOT_EMPTY, option


@dataclasses.dataclass(frozen=True)
class ChoiceFilesSource(ChoiceSourceOptions):
  """Lines of JSON with `prompt`, `answers` (a list) and `label` (an index).

  Both splits have all lines, so examples before a question have to come from
  another source; otherwise the model would be given the answers.
  """

  has_train_split = False

  pattern: str = option(
    dataclasses.MISSING,
    "Path of the files of questions, with '*' for any name and '**' for "
    'folders of any depth.',
    NOT_EMPTY,
  )

  def items(self, selection: Selection = Selection()) -> ItemSource:
    """An item for each line that is not empty.

    Raises:
      ValueError: No file matches, all are empty, or a line is no item.
    """
    del selection
    paths = matching(self.pattern)
    items = [
      _of_line(line, f'{path}, line {number}')
      for path in paths
      for number, line in _lines(path)
      if line.strip()
    ]
    if not items:
      raise InputError(f'the {len(paths)} files of {self.pattern!r} are empty')
    return ItemSource(
      f'files:{self.pattern} ({len(items)} items)', lambda split: items
    )


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """The lines of a file with their numbers, from 1."""
  try:
    with path.open(encoding='utf-8') as file:
      yield from enumerate(file, 1)
  except UnicodeDecodeError as error:
    raise InputError(f'{path} is not UTF-8: {error}') from None


def _of_line(line: str, where: str) -> Item:
  value = parse_json(line, where)
  keys = set(Item._fields)
  if not isinstance(value, dict) or not keys <= value.keys():
    raise InputError(f'{where} is no object with {sorted(keys)}')
  item = Item._make(value[key] for key in Item._fields)
  return check_item(*item, where)
