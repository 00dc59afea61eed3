"""The items that `experiments.launch` runs: from sweeps or a Python file.

An item is one run of `python -m moe_jax.main`, of one process or of several.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.launching import processes as processes_lib
from experiments.launching.processes import Command
from moe_jax import run_config
from moe_jax.errors import InputError
from moe_jax.run_config import RunConfig
from moe_jax.runs import retention
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training import early_stopping
from moe_jax.training.setup import DUE

FINISHED = 'launched.json'
LOG = 'launch.log'


@dataclasses.dataclass(frozen=True)
class Item:
  """One run of `python -m moe_jax.main`, as `experiments.launch` starts it.

  Attributes:
    config: Config file, with its argument if it has one: 'configs/name.py' or
      'configs/name.py:runlocal'.
    overrides: Values of config keys by dotted name,
      `{'model.moe.num_experts': 4}`.
    workdir: Folder of this run, shared with no other.
  """

  config: str
  overrides: Mapping[str, Any]
  workdir: str

  def flags(self) -> list[str]:
    """The overrides as arguments of `moe_jax.main`."""
    return [f'--config.{key}={value}' for key, value in self.overrides.items()]


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
  for values in itertools.product(*sweeps.values()):
    chosen = dict(zip(sweeps, values, strict=True))
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


def check(items: Sequence[Item]) -> None:
  """Reads every config before anything starts.

  Raises:
    ValueError: A config does not exist or is wrong, or two items share a
      workdir or a folder of checkpoints.
  """
  folders = [pathlib.Path(item.workdir) for item in items]
  _check_own('workdir', folders)
  _check_own(
    'checkpoint.directory',
    [_checkpoints(item, _options(item)) for item in items],
  )


def _options(item: Item) -> RunConfig:
  return run_config.options_of(item.config, item.flags())[0]


def _checkpoints(item: Item, options: RunConfig) -> os.PathLike[str]:
  return workdir_lib.checkpoints_of(
    pathlib.Path(item.workdir), options.checkpoint.directory
  )


def _check_own(setting: str, folders: Sequence[os.PathLike[str]]) -> None:
  names = list(map(os.fspath, folders))
  names = [n if '://' in n else os.path.realpath(n) for n in names]
  for name in names:
    if names.count(name) > 1:
      raise InputError(f'two items have the {setting} {name}')


def is_finished(item: Item) -> bool:
  """Whether the item's workdir has this very run, finished.

  A run that has trained but not yet drawn its plots is not finished.
  """
  path = pathlib.Path(item.workdir) / FINISHED
  return path.exists() and json.loads(path.read_text()) == _described(item)


def note_finished(item: Item) -> bool:
  """Records that the item's run has finished: by its last step, or early.

  Call this after all of the run's processes have ended with status 0.

  Returns:
    Whether the run has finished.
  """
  folder, options = pathlib.Path(item.workdir), _options(item)
  # A `Checkpointer` would open the devices, which the items' processes need.
  directory = retention.Directory(_checkpoints(item, options))
  steps = directory.steps()
  extra = directory.manifest(steps[-1]).extra if steps else {}
  is_last = options.total_steps in steps or early_stopping.has_ended(extra)
  if not is_last or extra.get(DUE):
    return False
  text = json.dumps(_described(item), indent=2)
  workdir_lib.write_text(folder / FINISHED, text + '\n')
  return True


def _described(item: Item) -> dict[str, Any]:
  return json.loads(
    json.dumps({'config': item.config, 'overrides': dict(item.overrides)})
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
  command = [
    sys.executable,
    '-m',
    'moe_jax.main',
    f'--config={item.config}',
    f'--workdir={item.workdir}',
    *item.flags(),
  ]

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
    complete=functools.partial(note_finished, item),
    env=env,
  )
