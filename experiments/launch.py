"""Runs many configs on this machine, or one of them as several processes.

    python -m experiments.launch --config=configs/tiny_switch.py \
      --sweep seed=0,1,2 --sweep model.moe.num_experts=4,8 --output=runs/sweep
    python -m experiments.launch --items=my_study.py \
      --accelerator=gpu --devices=8
    python -m experiments.launch --config=configs/tiny_switch.py \
      --processes=2 --devices_per_process=4 --output=runs/two

Every item is `python -m moe_jax.main` in a process, with its own workdir and
`launch.log`. The same command again skips what is finished and goes on with
what is not; an item that fails does not stop the others. `--sweep`s multiply.
`--items` is a Python file with `get_items() -> list[experiments.launch.Item]`.
The exit status is 0 if all are done, 1 if one failed, 130 if it was stopped.
Not here: what a study concludes (`study/study.py`).
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study import local_runs
from experiments.study.local_runs import Job
from experiments.study.sweeps import product
from moe_jax import command_line
from moe_jax.runs import retention
from moe_jax.runs import workdir as workdir_lib

FINISHED = 'launched.json'
LOG = 'launch.log'
_OURS = 'moe_jax: '
_LONGEST = 200


@dataclasses.dataclass(frozen=True)
class Item:
  """One run.

  Attributes:
    config: 'configs/name.py', or with an argument, 'configs/name.py:runlocal'.
    overrides: By dotted name, `{'model.moe.num_experts': 4}`.
    workdir: Of its own.
  """

  config: str
  overrides: Mapping[str, Any]
  workdir: str

  def flags(self) -> list[str]:
    """As `moe_jax.main` takes them."""
    return [f'--config.{key}={value}' for key, value in self.overrides.items()]


def swept(
  config: str,
  overrides: Mapping[str, Any],
  sweeps: Mapping[str, Sequence[Any]],
  output: str,
) -> list[Item]:
  """An item for every combination of the swept values, the last key fastest."""
  items = []
  for chosen in product(sweeps):
    # 'seed=0,num_experts=4': the names' last parts do, where they differ.
    short = {key: key.rpartition('.')[2] for key in chosen}
    if len(set(short.values())) < len(short):
      short = {key: key for key in chosen}
    name = ','.join(f'{short[key]}={value}' for key, value in chosen.items())
    folder = pathlib.Path(output) / (name.replace('/', '_') or 'run')
    items.append(Item(config, {**overrides, **chosen}, str(folder)))
  return items


def read_items(path: str) -> list[Item]:
  """What `get_items()` of a Python file returns.

  Raises:
    ValueError: There is no such file or function, or an item is none.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise ValueError(f'--items={path} does not exist')
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_items'):
    raise ValueError(f'{path} defines no get_items()')
  return [_item(item, path) for item in module.get_items()]


def _item(item: Any, path: str) -> Item:
  match item:
    case Item():
      return item
    case (str(), Mapping(), str() | pathlib.Path()):
      return Item(*item)
  raise ValueError(
    f'{path}: get_items() has {item!r}, which is no (config, overrides, '
    'workdir): text, a dict and a path'
  )


def check(items: Sequence[Item]) -> None:
  """Reads every config before anything starts.

  Raises:
    ValueError: One does not exist, or two items have one workdir
      or one folder of checkpoints.
  """
  folders = [pathlib.Path(item.workdir) for item in items]
  _check_own('workdir', folders)
  configs = [command_line.config_of(i.config, i.flags()) for i in items]
  pairs = zip(folders, configs, strict=True)
  _check_own(
    'checkpoint.directory',
    [workdir_lib.checkpoints_of(*pair) for pair in pairs],
  )


def _check_own(what: str, folders: Sequence[os.PathLike[str]]) -> None:
  names = list(map(os.fspath, folders))
  names = [n if '://' in n else os.path.realpath(n) for n in names]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f'two items have the {what} {name}')


def is_finished(item: Item) -> bool:
  """Whether the item's run, and not another, is at its last step.

  A run that has trained but not yet drawn its plots is not finished.
  """
  path = pathlib.Path(item.workdir) / FINISHED
  return path.exists() and json.loads(path.read_text()) == _described(item)


def note_finished(item: Item) -> bool:
  """`is_finished` after a process has ended well: notes it, if it is so."""
  folder = pathlib.Path(item.workdir)
  config = command_line.config_of(item.config, item.flags())
  # No `Checkpointer`: it would open the devices, which are the items'.
  where = workdir_lib.checkpoints_of(folder, config)
  kept = retention.Directory(where, 1, False, '')
  if config.total_steps not in kept.steps():
    return False
  text = json.dumps(_described(item), indent=2)
  workdir_lib.write_text(folder / FINISHED, text + '\n')
  return True


def _described(item: Item) -> dict[str, Any]:
  return json.loads(
    json.dumps({'config': item.config, 'overrides': dict(item.overrides)})
  )


def make_job(
  item: Item, processes: int = 1, devices_per_process: int = 0
) -> Job:
  """The item's processes.

  Args:
    item: The run.
    processes: How many run it together, over a port of this machine.
    devices_per_process: CPUs that each of them pretends to have; 0: what there
      is.
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
    address = f'127.0.0.1:{local_runs.free_port()}'
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
  return Job(
    name=str(folder),
    commands=commands,
    logs=[folder / (f'launch.{i}.log' if i else LOG) for i in range(processes)],
    finished=functools.partial(is_finished, item),
    complete=functools.partial(note_finished, item),
    env=env,
  )


def summary(jobs: Sequence[Job], outcomes: Mapping[str, str]) -> str:
  """A line an item; of one that failed also its logs, and what they end in."""
  lines = []
  for job in jobs:
    lines.append(f'{outcomes[job.name]:12}{job.name}')
    if outcomes[job.name] == local_runs.FAILED:
      ends = {log: _end_of(log) for log in job.logs}
      said = [log for log, end in ends.items() if end.startswith(_OURS)]
      # A process that is lost takes the others with it, and they say so.
      for log in said or ends:
        lines.append(f'            {log}: {ends[log]}')
  return '\n'.join(lines)


def _end_of(log: pathlib.Path) -> str:
  """The last line, or the last that is this package's own."""
  text = log.read_text(encoding='utf-8', errors='replace')
  lines = [line for line in text.splitlines() if line.strip()] or ['(empty)']
  ours = [line for line in lines if line.startswith(_OURS)]
  return (ours or lines)[-1][:_LONGEST]


def _pair(text: str) -> tuple[str, str]:
  key, equals, value = text.partition('=')
  if not equals or not key:
    raise argparse.ArgumentTypeError(f'{text!r} is not key=value')
  return key.removeprefix('config.'), value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.launch', description=__doc__.split('\n')[0]
  )
  add = parser.add_argument
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument('--config', help='configs/name.py, of every item')
  what.add_argument('--items', help='a Python file with get_items()')
  add(
    '--set',
    type=_pair,
    action='append',
    default=[],
    metavar='KEY=VALUE',
    help='a key of all items',
  )
  add(
    '--sweep',
    type=_pair,
    action='append',
    default=[],
    metavar='KEY=V1,V2',
    help='values of a key, an item each',
  )
  add('--output', default='runs/launch', help='of the workdirs of --config')
  add('--workers', type=int, default=1, help='items at a time')
  add('--accelerator', choices=['gpu', 'tpu'], default='', help='one an item')
  add('--devices', type=int, default=0, help='how many accelerators')
  add('--processes', type=int, default=1, help='of each item, together')
  add('--devices_per_process', type=int, default=0, help='fake CPUs of each')
  add('--grace_seconds', type=float, default=120.0, help='to save, if stopped')
  options = parser.parse_args(argv)
  if bool(options.accelerator) != (options.devices > 0):
    parser.error('--accelerator and --devices go together')
  if options.accelerator and (options.processes > 1 or options.workers > 1):
    parser.error('--accelerator runs one item a device, in one process each')
  if options.items and (options.sweep or options.set):
    parser.error('--items has its own overrides')
  if min(options.workers, options.processes) < 1:
    parser.error('--workers and --processes are at least 1')
  return options


def items_of(options: argparse.Namespace) -> list[Item]:
  """Those of the file, or of the sweeps.

  Raises:
    ValueError: See `read_items`; or a key is swept twice.
  """
  if options.items:
    return read_items(options.items)
  keys = [key for key, _ in [*options.set, *options.sweep]]
  for key in keys:
    if keys.count(key) > 1:
      raise ValueError(f'{key} is given twice')
  sweeps = {key: values.split(',') for key, values in options.sweep}
  return swept(options.config, dict(options.set), sweeps, options.output)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs all items; the exit status."""
  options = parse(argv)
  try:
    items = items_of(options)
    check(items)
    places = local_runs.places(
      options.workers, options.accelerator, options.devices
    )
  except (OSError, ValueError) as error:
    command_line.fail(str(error))
  jobs = [
    make_job(item, options.processes, options.devices_per_process)
    for item in items
  ]
  outcomes = local_runs.run_all(
    jobs,
    places,
    grace_seconds=options.grace_seconds,
    message=functools.partial(print, flush=True),
  )
  print(summary(jobs, outcomes))
  if local_runs.FAILED in outcomes.values():
    return 1
  return 0 if set(outcomes.values()) <= {local_runs.DONE} else 130


if __name__ == '__main__':
  sys.exit(main())
