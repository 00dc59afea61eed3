"""The items that `experiments.launch` runs, from sweeps or a Python file."""

import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study.jobs import Item
from experiments.study.sweeps import product
from moe_jax.errors import InputError


def swept(
  config: str,
  overrides: Mapping[str, Any],
  sweeps: Mapping[str, Sequence[Any]],
  output: str,
) -> list[Item]:
  """Makes an item for every combination of swept values, last key fastest.

  Args:
    config: Config of every item, 'configs/name.py'.
    overrides: Values that all items change, by dotted name.
    sweeps: Lists of values by dotted name.
    output: Folder of the items' workdirs.
  """
  items = []
  for chosen in product(sweeps):
    # A workdir's name has the last parts of keys, 'seed=0,num_experts=4', or
    # where these are not unique the whole keys.
    short = {key: key.rpartition('.')[2] for key in chosen}
    if len(set(short.values())) < len(short):
      short = {key: key for key in chosen}
    name = ','.join(f'{short[key]}={value}' for key, value in chosen.items())
    folder = pathlib.Path(output) / (name.replace('/', '_') or 'run')
    items.append(Item(config, {**overrides, **chosen}, str(folder)))
  return items


def read_items(path: str) -> list[Item]:
  """The items that `get_items()` of a Python file returns.

  Raises:
    ValueError: There is no such file or function, or the function returns
      something that is no item.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise InputError(f'--items={path} does not exist')
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_items'):
    raise InputError(f'{path} defines no get_items()')
  return [_item(item, path) for item in module.get_items()]


def _item(item: Any, path: str) -> Item:
  match item:
    case Item():
      return item
    case (str(), Mapping(), str() | pathlib.Path()):
      return Item(*item)
  raise InputError(
    f'{path}: get_items() has {item!r}, which is no (config, overrides, '
    'workdir): text, a dict and a path'
  )
