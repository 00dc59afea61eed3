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
file with `get_items() -> list[experiments.launching.items.Item]`. The exit
status is 0 if all are done, 1 if one failed, 130 if it was stopped.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence

from experiments.launching import processes as processes_lib
from experiments.launching.items import (
  Item,
  check,
  is_finished,
  make_command,
  read_items,
  swept,
)
from experiments.launching.processes import Command
from moe_jax import cli
from moe_jax.errors import InputError

_OURS = 'moe_jax: '
_LONGEST = 200


def summary(commands: Sequence[Command], outcomes: Mapping[str, str]) -> str:
  """A line for each item's outcome, and for failed ones the ends of logs."""
  lines = []
  for command in commands:
    lines.append(f'{outcomes[command.name]:12}{command.name}')
    if outcomes[command.name] == processes_lib.FAILED:
      ends = {log: _end_of(log) for log in command.logs}
      own_logs = [log for log, end in ends.items() if end.startswith(_OURS)]
      # When one process is lost, the others' logs end with errors that only
      # say so: prefer the logs that end with a message of this package.
      for log in own_logs or ends:
        lines.append(f'            {log}: {ends[log]}')
  return '\n'.join(lines)


def _end_of(log: pathlib.Path) -> str:
  """Last line of a log, or its last message of this package if it has one."""
  text = log.read_text(encoding='utf-8', errors='replace')
  lines = [line for line in text.splitlines() if line.strip()] or ['(empty)']
  messages = [line for line in lines if line.startswith(_OURS)]
  return (messages or lines)[-1][:_LONGEST]


def _pair(text: str) -> tuple[str, str]:
  key, equals, value = text.partition('=')
  if not equals or not key:
    raise argparse.ArgumentTypeError(f'{text!r} is not key=value')
  return key.removeprefix('config.'), value


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """The command line, and the overrides of all items."""
  parser = cli.Parser(
    prog='python -m experiments.launch',
    description=__doc__.split('\n')[0],
    epilog='Keys of all items can be changed: --config.seed=1',
    allow_abbrev=False,
  )
  add = parser.add_argument
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument('--config', help='config of every item: configs/name.py')
  source.add_argument('--items', help='Python file with get_items()')
  add(
    '--sweep',
    type=_pair,
    action='append',
    default=[],
    metavar='KEY=V1,V2',
    help='values of a config key; each value makes an item',
  )
  add('--output', default='runs/launch', help='folder of the workdirs')
  add(
    '--workers',
    type=cli.POSITIVE,
    default=1,
    help='number of items at a time',
  )
  add(
    '--accelerator',
    choices=['gpu', 'tpu'],
    default='',
    help='kind of device, of which every item gets one',
  )
  add(
    '--devices',
    type=cli.NOT_NEGATIVE,
    default=0,
    help='number of accelerators',
  )
  add(
    '--processes',
    type=cli.POSITIVE,
    default=1,
    help='processes of each item',
  )
  add(
    '--devices_per_process',
    type=cli.NOT_NEGATIVE,
    default=0,
    help='fake CPU devices of each process; 0: the real devices',
  )
  add(
    '--grace_seconds',
    type=cli.SECONDS,
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
      raise InputError(
        f'unexpected argument {name!r}; overrides are --config.key=value'
      )
    if not equals:
      if not words:
        raise InputError(f'{name} has no value')
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
      raise InputError(f'{key} is given twice')
  sweeps = {key: values.split(',') for key, values in options.sweep}
  return swept(options.config, dict(shared), sweeps, options.output)


def run(
  items: Sequence[Item],
  commands: Sequence[Command],
  environments: Sequence[processes_lib.Environment],
  grace_seconds: float,
) -> dict[str, str]:
  """Runs the items that are not finished.

  Args:
    items: All items.
    commands: The command of each item.
    environments: Environment variables of each place in which an item can run.
    grace_seconds: Seconds from asking an item to stop to killing it.

  Returns:
    The outcome of every item, by the name of its command.
  """
  print_now = functools.partial(print, flush=True)
  outcomes, missing = {}, []
  for item, command in zip(items, commands, strict=True):
    if is_finished(item):
      print_now(f'{command.name}: finished before')
      outcomes[command.name] = processes_lib.DONE
    else:
      missing.append(command)
  return outcomes | processes_lib.run_all(
    missing, environments, grace_seconds, print_now
  )


@cli.reported()
def main(argv: Sequence[str] | None = None) -> int:
  """Runs all items and returns the exit status."""
  options, overrides = parse(argv)
  items = items_of(options, overrides)
  check(items)
  environments = processes_lib.places(
    options.workers, options.accelerator, options.devices
  )
  commands = [
    make_command(item, options.processes, options.devices_per_process)
    for item in items
  ]
  outcomes = run(items, commands, environments, options.grace_seconds)
  print(summary(commands, outcomes))
  if processes_lib.FAILED in outcomes.values():
    return 1
  return 0 if set(outcomes.values()) <= {processes_lib.DONE} else 130


if __name__ == '__main__':
  sys.exit(main())
