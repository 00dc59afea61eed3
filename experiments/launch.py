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
import sys
from collections.abc import Mapping, Sequence

from experiments.launching import job_files
from experiments.launching import processes as processes_lib
from experiments.launching.items import make_command, read_items
from experiments.launching.processes import Command
from moe_jax import cli
from moe_jax.items import Item, add_sweep, check, last_message, swept

LOCAL = 'local'
# Options that have an effect on this machine alone, and on clusters alone.
_OF_LOCAL = ('workers', 'accelerator', 'devices', 'processes')
_OF_LOCAL += ('devices_per_process', 'grace_seconds')
_OF_CLUSTERS = ('topology', 'submit', 'name', 'image', 'cluster', 'volume')
_OF_CLUSTERS += ('restarts', 'option')


def summary(commands: Sequence[Command], outcomes: Mapping[str, str]) -> str:
  """A line for each item's outcome, and for failed ones the ends of logs."""
  lines = []
  for command in commands:
    lines.append(f'{outcomes[command.name]:12}{command.name}')
    if outcomes[command.name] == processes_lib.FAILED:
      ends = {log: last_message(log) for log in command.logs}
      own_logs = [
        log for log, end in ends.items() if end.startswith('moe_jax:')
      ]
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
  _add_local(parser)
  _add_clusters(parser)
  options, overrides = cli.parse_command(parser, argv, lambda options: True)
  without_effect = _OF_CLUSTERS if options.to == LOCAL else _OF_LOCAL
  for name in without_effect:
    if getattr(options, name) != parser.get_default(name):
      parser.error(f'--{name} has no effect with --to={options.to}')
  if options.to != LOCAL and not options.topology:
    parser.error(f'--to={options.to} needs --topology, such as 2x8xh100')
  if bool(options.accelerator) != (options.devices > 0):
    parser.error('--accelerator and --devices go together')
  if options.accelerator and (options.processes > 1 or options.workers > 1):
    parser.error('--accelerator runs one item a device, in one process each')
  if options.items and (options.sweep or overrides):
    parser.error('--items has its own overrides')
  return options, overrides


def _add_local(parser: argparse.ArgumentParser) -> None:
  """Adds the options of runs on this machine."""
  add = parser.add_argument_group(f'with --to={LOCAL}').add_argument
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


def _add_clusters(parser: argparse.ArgumentParser) -> None:
  """Adds the options of jobs on clusters."""
  add = parser.add_argument_group('with another --to').add_argument
  add('--topology', default='', help='2x8xh100, v5p-128, 2xv6e-16, v5p:4x4x4')
  add('--submit', action='store_true', help='submit the jobs')
  add('--name', default='', help="first part of the jobs' names")
  add('--image', default='', help='container with moe_jax (jobset, xpk)')
  add('--cluster', default='', help='name of the cluster (xpk)')
  add(
    '--volume',
    default='',
    metavar='NAME:/FOLDER',
    help='storage that all machines mount there: a persistent volume claim '
    '(jobset), or a URL of a bucket (skypilot)',
  )
  add(
    '--restarts',
    type=cli.NOT_NEGATIVE,
    default=20,
    help='number of times that a job which fails is started again',
  )
  add(
    '--option',
    action='append',
    default=[],
    help='further option of sbatch, kubectl apply, xpk workload create or sky '
    'jobs launch: --option=--partition=gpu; repeatable',
  )


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
    if item.is_finished():
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
  if options.to != LOCAL:
    return job_files.run(items, options)
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
