"""The items of a Python file, and the processes of an item on this machine.

An item is one run of `python -m moe_jax.main`, of one process or of several.
"""

import importlib.util
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from experiments.launching import processes as processes_lib
from experiments.launching.processes import Command
from moe_jax.errors import InputError
from moe_jax.items import LOG, Item


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


def make_command(
  item: Item, processes: int = 1, devices_per_process: int = 0
) -> Command:
  """The commands of an item's processes, with their logs and environment.

  Args:
    item: The run.
    processes: Number of processes that run it together, connected over a port
      of this machine.
    devices_per_process: Number of fake CPU devices of each process; 0 uses the
      real devices.
  """
  folder = pathlib.Path(item.workdir)
  command = [sys.executable, '-m', *item.words()]

  def commands():
    if processes == 1:
      return [command]
    address = f'127.0.0.1:{processes_lib.free_port()}'
    together = [f'--coordinator={address}', f'--num_processes={processes}']
    return [
      [*command, *together, f'--process_id={i}'] for i in range(processes)
    ]

  env = {}
  if devices_per_process:
    env = {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices_per_process),
    }
  return Command(
    name=str(folder),
    commands=commands,
    logs=[folder / (f'launch.{i}.log' if i else LOG) for i in range(processes)],
    done=item.note_finished,
    env=env,
  )
