"""Runs many configs on this machine, or one of them as several processes.

    python -m experiments.launch --config=configs/tiny_switch.py \
      --sweep seed=0,1,2 --sweep model.moe.num_experts=4,8 --output=runs/sweep
    python -m experiments.launch --items=my_study.py \
      --accelerator=gpu --devices=8
    python -m experiments.launch --config=configs/tiny_switch.py \
      --processes=2 --devices_per_process=4 --output=runs/two \
      --config.model.moe.num_experts=16

Every item is `python -m moe_jax.main` in a process, with its own workdir and
`launch.log`. The same command again skips what is finished and goes on with
what is not; an item that fails does not stop the others. `--sweep`s multiply.
Overrides of all items are given as to `moe_jax.main`. `--items` is a Python
file with `get_items() -> list[experiments.study.jobs.Item]`. The exit status
is 0 if all are done, 1 if one failed, 130 if it was stopped.
Not here: what a study concludes (`study/study.py`).
"""

import argparse
import functools
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study import processes as processes_lib
from experiments.study import scheduler
from experiments.study.items import read_items, swept
from experiments.study.jobs import Item
from experiments.study.processes import Command
from moe_jax import command_line, config_flag
from moe_jax.run_config import RunConfig
from moe_jax.runs import retention
from moe_jax.runs import workdir as workdir_lib

FINISHED = 'launched.json'
LOG = 'launch.log'
_OURS = 'moe_jax: '
_LONGEST = 200


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
  return config_flag.options_of(item.config, item.flags())[0]


def _checkpoints(item: Item, options: RunConfig) -> os.PathLike[str]:
  return workdir_lib.checkpoints_of(
    pathlib.Path(item.workdir), options.checkpoint.directory
  )


def _check_own(what: str, folders: Sequence[os.PathLike[str]]) -> None:
  names = list(map(os.fspath, folders))
  names = [n if '://' in n else os.path.realpath(n) for n in names]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f'two items have the {what} {name}')


def is_finished(item: Item) -> bool:
  """Whether the item's workdir has this very run, finished.

  A run that has trained but not yet drawn its plots is not finished.
  """
  path = pathlib.Path(item.workdir) / FINISHED
  return path.exists() and json.loads(path.read_text()) == _described(item)


def note_finished(item: Item) -> bool:
  """Records that the item's run has finished, if it is at its last step.

  Call this after all of the run's processes have ended with status 0.

  Returns:
    Whether the run has finished.
  """
  folder, options = pathlib.Path(item.workdir), _options(item)
  # A `Checkpointer` would open the devices, which the items' processes need.
  kept = retention.Directory(_checkpoints(item, options), 1, False, '')
  if options.total_steps not in kept.steps():
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
  """The commands of an item's processes, and what belongs to them.

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


def summary(commands: Sequence[Command], outcomes: Mapping[str, str]) -> str:
  """A line for each item's outcome, and for failed ones the ends of logs."""
  lines = []
  for command in commands:
    lines.append(f'{outcomes[command.name]:12}{command.name}')
    if outcomes[command.name] == scheduler.FAILED:
      ends = {log: _end_of(log) for log in command.logs}
      said = [log for log, end in ends.items() if end.startswith(_OURS)]
      # When one process is lost, the others' logs end with errors that only
      # say so: prefer the logs that end with a message of this package.
      for log in said or ends:
        lines.append(f'            {log}: {ends[log]}')
  return '\n'.join(lines)


def _end_of(log: pathlib.Path) -> str:
  """Last line of a log, or its last message of this package if it has one."""
  text = log.read_text(encoding='utf-8', errors='replace')
  lines = [line for line in text.splitlines() if line.strip()] or ['(empty)']
  ours = [line for line in lines if line.startswith(_OURS)]
  return (ours or lines)[-1][:_LONGEST]


def _pair(text: str) -> tuple[str, str]:
  key, equals, value = text.partition('=')
  if not equals or not key:
    raise argparse.ArgumentTypeError(f'{text!r} is not key=value')
  return key.removeprefix('config.'), value


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """The command line, and the overrides of all items."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.launch',
    description=__doc__.split('\n')[0],
    epilog='Keys of all items can be changed: --config.seed=1',
    allow_abbrev=False,
  )
  add = parser.add_argument
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument('--config', help='config of every item: configs/name.py')
  what.add_argument('--items', help='Python file with get_items()')
  add(
    '--sweep',
    type=_pair,
    action='append',
    default=[],
    metavar='KEY=V1,V2',
    help='values of a config key; each value makes an item',
  )
  add('--output', default='runs/launch', help='folder of the workdirs')
  add('--workers', type=int, default=1, help='number of items at a time')
  add(
    '--accelerator',
    choices=['gpu', 'tpu'],
    default='',
    help='kind of device, of which every item gets one',
  )
  add('--devices', type=int, default=0, help='number of accelerators')
  add('--processes', type=int, default=1, help='processes of each item')
  add(
    '--devices_per_process',
    type=int,
    default=0,
    help='fake CPU devices of each process; 0: the real devices',
  )
  add(
    '--grace_seconds',
    type=float,
    default=120.0,
    help='seconds that a stopped item may take to save',
  )
  options, overrides = parser.parse_known_args(argv)
  if bool(options.accelerator) != (options.devices > 0):
    parser.error('--accelerator and --devices go together')
  if options.accelerator and (options.processes > 1 or options.workers > 1):
    parser.error('--accelerator runs one item a device, in one process each')
  if options.items and (options.sweep or overrides):
    parser.error('--items has its own overrides')
  if min(options.workers, options.processes) < 1:
    parser.error('--workers and --processes are at least 1')
  return options, overrides


def _pairs_of(overrides: Sequence[str]) -> list[tuple[str, str]]:
  """Pairs (key, value) of the words of overrides on the command line.

  Args:
    overrides: Words '--config.key=value', or '--config.key' and 'value'.

  Raises:
    ValueError: A word is no override, or a key has no value.
  """
  pairs, words = [], list(overrides)
  while words:
    name, equals, value = words.pop(0).partition('=')
    if not name.startswith('--config.'):
      raise ValueError(
        f'unexpected argument {name!r}; overrides are --config.key=value'
      )
    if not equals:
      if not words:
        raise ValueError(f'{name} has no value')
      value = words.pop(0)
    pairs.append((name.removeprefix('--config.'), value))
  return pairs


def items_of(
  options: argparse.Namespace, overrides: Sequence[str] = ()
) -> list[Item]:
  """The items of `--items`, or those of `--config` and its sweeps.

  Args:
    options: Parsed command line.
    overrides: Words of the overrides of all items.

  Raises:
    ValueError: The file is wrong (see `read_items`), a key is given twice, or
      a word is no override.
  """
  if options.items:
    return read_items(options.items)
  shared = _pairs_of(overrides)
  keys = [key for key, _ in [*shared, *options.sweep]]
  for key in keys:
    if keys.count(key) > 1:
      raise ValueError(f'{key} is given twice')
  sweeps = {key: values.split(',') for key, values in options.sweep}
  return swept(options.config, dict(shared), sweeps, options.output)


def run(
  items: Sequence[Item],
  commands: Sequence[Command],
  places: Sequence[processes_lib.Environment],
  grace_seconds: float,
) -> dict[str, str]:
  """Runs the items that are not finished.

  Args:
    items: All items.
    commands: The command of each item.
    places: Environment variables of each slot in which an item can run.
    grace_seconds: Seconds from asking an item to stop to killing it.

  Returns:
    The outcome of every item, by the name of its command.
  """
  say = functools.partial(print, flush=True)
  outcomes, tasks = {}, {}
  for item, command in zip(items, commands, strict=True):
    if is_finished(item):
      say(f'{command.name}: finished before')
      outcomes[command.name] = scheduler.DONE
    else:
      tasks[command.name] = command.begin
  return outcomes | scheduler.run_all(
    tasks,
    places,
    grace_seconds=grace_seconds,
    message=say,
    begins=lambda name: say(f'{name}: starts'),
    ends=lambda name, outcome, _: say(f'{name}: {outcome}'),
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs all items and returns the exit status."""
  options, overrides = parse(argv)
  try:
    items = items_of(options, overrides)
    check(items)
    places = processes_lib.places(
      options.workers, options.accelerator, options.devices
    )
  except (OSError, ValueError) as error:
    command_line.fail(str(error))
  commands = [
    make_command(item, options.processes, options.devices_per_process)
    for item in items
  ]
  outcomes = run(items, commands, places, options.grace_seconds)
  print(summary(commands, outcomes))
  if scheduler.FAILED in outcomes.values():
    return 1
  return 0 if set(outcomes.values()) <= {scheduler.DONE} else 130


if __name__ == '__main__':
  sys.exit(main())
