"""Runs many configs on this machine, or makes their job files for a cluster.

    python -m experiments.launch --config=configs/tiny_switch.py \
      --sweep seed=0,1,2 --sweep model.moe.num_experts=4,8 --output=runs/sweep
    python -m experiments.launch --items=my_study.py \
      --accelerator=gpu --devices=8
    python -m experiments.launch --config=configs/tiny_switch.py \
      --processes=2 --devices_per_process=4 --output=runs/two \
      --config.model.moe.num_experts=16
    python -m experiments.launch --config=configs/mixtral_8x7b.py \
      --to=sbatch --topology=8x8xh100 --output=/scratch/runs --submit \
      --option=--time=24:00:00 --config.microbatches=8
    python -m experiments.launch --config=configs/mixtral_8x7b.py \
      --to=jobset --topology=v5p-128 --image=my-image --volume=runs:/shared \
      --output=/shared/runs --config.mesh.expert=4 --config.microbatches=8

Every item is `python -m moe_jax.main` in a process, with its own workdir and
`launch.log`. The same command again skips what is finished and goes on with
what is not; an item that fails does not stop the others. `--sweep`s multiply.
Overrides of all items are given as to `moe_jax.main`. `--items` is a Python
file with `get_items() -> list[moe_jax.items.Item]`. The exit status is 0 if all
are done, 1 if one failed, 130 if it was stopped.

With --to an item becomes a job on the devices of --topology, which its mesh has
to fit; the job is started again when it is preempted, and goes on. The job file
is printed, or with --submit written to `runs/jobs` and submitted.
"""

import argparse
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.launching import job_files
from experiments.launching import processes as processes_lib
from experiments.launching.processes import DONE, FAILED, Command, run_all
from moe_jax import cli
from moe_jax.errors import InputError
from moe_jax.items import LOG, Item, add_sweep, check, last_message, swept

LOCAL = 'local'


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
    flags = [f'--coordinator={address}', f'--num_processes={processes}']
    return [[*command, *flags, f'--process_id={i}'] for i in range(processes)]

  devices = {'JAX_PLATFORMS': 'cpu'}
  devices['JAX_NUM_CPU_DEVICES'] = str(devices_per_process)
  return Command(
    name=str(folder),
    commands=commands,
    logs=[folder / (f'launch.{i}.log' if i else LOG) for i in range(processes)],
    done=item.note_finished,
    env=devices if devices_per_process else {},
  )


def summary(commands: Sequence[Command], outcomes: Mapping[str, str]) -> str:
  """A line for each item's outcome, and for failed ones the ends of logs."""
  lines = []
  for command in commands:
    lines.append(f'{outcomes[command.name]:12}{command.name}')
    if outcomes[command.name] == FAILED:
      ends = {log: last_message(log) for log in command.logs}
      own_logs = [x for x, end in ends.items() if end.startswith('moe_jax:')]
      # When one process is lost, the others' logs end with errors that only
      # say so: prefer the logs that end with a message of this package.
      for log in own_logs or ends:
        lines.append(f'            {log}: {ends[log]}')
  return '\n'.join(lines)


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
  add_sweep(parser)
  add('--output', default='runs/launch', help='folder of the workdirs')
  add('--to', default=LOCAL, choices=[LOCAL, *job_files.TARGETS])
  of_local, of_clusters = _add_local(parser), _add_clusters(parser)
  options, overrides = cli.parse_command(parser, argv, lambda options: True)
  for flag in of_clusters if options.to == LOCAL else of_local:
    if getattr(options, flag.dest) != flag.default:
      parser.error(f'--{flag.dest} has no effect with --to={options.to}')
  if options.to != LOCAL and not options.topology:
    parser.error(f'--to={options.to} needs --topology, such as 2x8xh100')
  if bool(options.accelerator) != (options.devices > 0):
    parser.error('--accelerator and --devices go together')
  if options.accelerator and (options.processes > 1 or options.workers > 1):
    parser.error('--accelerator runs one item a device, in one process each')
  if options.items and (options.sweep or overrides):
    parser.error('--items has its own overrides')
  return options, overrides


def _add_local(parser: argparse.ArgumentParser) -> list[argparse.Action]:
  """Adds the flags of runs on this machine."""
  add = parser.add_argument_group(f'with --to={LOCAL}').add_argument
  count, seconds = cli.POSITIVE, cli.SECONDS
  kind = 'kind of device, of which every item gets one'
  fake = 'fake CPU devices of each process; 0: the real devices'
  grace = 'seconds that a stopped item may take to save'
  number = functools.partial(add, type=cli.NOT_NEGATIVE, default=0)
  return [
    add('--workers', type=count, default=1, help='number of items at a time'),
    add('--accelerator', choices=['gpu', 'tpu'], default='', help=kind),
    number('--devices', help='number of accelerators'),
    add('--processes', type=count, default=1, help='processes of each item'),
    number('--devices_per_process', help=fake),
    add('--grace_seconds', type=seconds, default=120.0, help=grace),
  ]


def _add_clusters(parser: argparse.ArgumentParser) -> list[argparse.Action]:
  """Adds the flags of jobs on clusters."""
  add = parser.add_argument_group('with another --to').add_argument
  topology = '2x8xh100, v5p-128, 2xv6e-16, v5p:4x4x4'
  volume = (
    'storage that all machines mount there: a persistent volume claim '
    '(jobset), or a URL of a bucket (skypilot)'
  )
  restarts = 'number of times that a job which fails is started again'
  option = (
    'further option of sbatch, kubectl apply, xpk workload create or sky jobs '
    'launch: --option=--partition=gpu; repeatable'
  )
  text = functools.partial(add, default='')
  count = cli.NOT_NEGATIVE
  return [
    text('--topology', help=topology),
    add('--submit', action='store_true', help='submit the jobs'),
    text('--name', help="first part of the jobs' names"),
    text('--image', help='container with moe_jax (jobset, xpk)'),
    text('--cluster', help='name of the cluster (xpk)'),
    text('--volume', metavar='NAME:/FOLDER', help=volume),
    add('--restarts', type=count, default=20, help=restarts),
    add('--option', action='append', default=[], help=option),
  ]


def items_of(
  options: argparse.Namespace, overrides: Sequence[str] = ()
) -> list[Item]:
  """The items of `--items`, or those of `--config` and its sweeps.

  Args:
    options: Parsed command line.
    overrides: Flags of all items, such as '--config.seed=1'.

  Raises:
    ValueError: The file is wrong (see `read_items`), or a key is given twice.
  """
  if options.items:
    return read_items(options.items)
  return swept(options.config, overrides, options.sweep, options.output)


@cli.reported()
def main(argv: Sequence[str] | None = None) -> int:
  """Runs all items and returns the exit status."""
  options, overrides = parse(argv)
  items = items_of(options, overrides)
  check(items)
  if options.to != LOCAL:
    return job_files.run(items, options)
  places = options.workers, options.accelerator, options.devices
  environments = processes_lib.places(*places)
  sizes = options.processes, options.devices_per_process
  commands = [make_command(item, *sizes) for item in items]
  print_now = functools.partial(print, flush=True)
  outcomes, missing = {}, []
  for item, command in zip(items, commands, strict=True):
    if item.is_finished():
      print_now(f'{command.name}: finished before')
      outcomes[command.name] = DONE
    else:
      missing.append(command)
  outcomes |= run_all(missing, environments, options.grace_seconds, print_now)
  print(summary(commands, outcomes))
  if FAILED in outcomes.values():
    return 1
  return 0 if set(outcomes.values()) <= {DONE} else 130


if __name__ == '__main__':
  sys.exit(main())
