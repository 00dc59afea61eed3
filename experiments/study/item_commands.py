"""Items as commands: their checks, their processes, and which have finished."""

import functools
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments.study import processes as processes_lib
from experiments.study.jobs import Item
from experiments.study.processes import Command
from moe_jax import run_config
from moe_jax.errors import InputError
from moe_jax.run_config import RunConfig
from moe_jax.runs import retention
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training import early_stopping
from moe_jax.training.setup import DUE

FINISHED = 'launched.json'
LOG = 'launch.log'


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
