"""Trains and evaluates the model that a config describes.

    python -m moe_jax.main --config=moe_jax:tiny_switch --workdir=runs/tiny
    python -m moe_jax.main --config=moe_jax:tiny_switch \
      --workdir=runs/tiny16 --config.model.moe.num_experts=16
    python -m moe_jax.main --config=moe_jax:tiny_switch --describe
    python -m moe_jax.main --config=moe_jax:tiny_switch \
      --workdir=runs/tiny --dry_run

The last two commands train nothing. The first of them prints every key of the
config with its value, its default and what it means (--describe=model.moe those
of a part); the second what the run would cost, need and do, with status 1 if it
would be refused.

On several hosts the same command is started on each. The environment says which
process it is (SLURM, Open MPI, TPU pods, GKE), or flags do:

      --coordinator=host0:9876 --num_processes=2 --process_id=0

SIGTERM and Ctrl-C save after the present step, and the same command goes on
from there; a second Ctrl-C stops at once. Exit status: 0 after the last step or
an early end; 75 if SIGTERM stopped the run before it; 130 after Ctrl-C; 1 with
a message of what is wrong.
"""

import argparse
import sys
from collections.abc import Sequence

from moe_jax import cli, run_config
from moe_jax.analysis.dry_run import DryRun
from moe_jax.analysis.hooks import default_hooks
from moe_jax.compression.distill import Distilling
from moe_jax.devices import (
  PROGRAMS_HELP,
  connected,
  is_first,
  keep_freed_memory,
  keep_programs,
)
from moe_jax.run_config import RunConfig
from moe_jax.training.loop import Interrupted, train_and_evaluate
from moe_jax.training.setup import Ended


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """Parses the command line; returns overrides of the config separately."""
  parser = cli.parser('moe_jax.main', __doc__)
  cli.add_config(parser)
  add = parser.add_argument
  add('--workdir', default='', help='folder of the run, for all that it writes')
  add('--resume', action='store_true', help='go on where the config differs')
  add(
    '--describe',
    nargs='?',
    const='',
    metavar='PART',
    help='print the keys of the config, or of a part of it; train nothing',
  )
  add('--dry_run', action='store_true', help='print what the run would do')
  add(
    '--allow_module',
    action='append',
    default=[],
    help='module or package from which the run in init_from.workdir or '
    'distill.teacher may import classes; repeatable. Classes that --config '
    'names are always allowed.',
  )
  add('--compile_cache', default='', help=PROGRAMS_HELP)
  add('--coordinator', help='host:port of process 0, for several processes')
  add('--num_processes', type=int, help='number of processes of the run')
  add('--process_id', type=int, help='number of this process, from 0')
  parser.set_defaults(run=_run)
  return cli.parse_command(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  keep_freed_memory()
  status = cli.run_command(*parse(argv))
  if status:
    sys.exit(status)


def _run(flags: argparse.Namespace, overrides: list[str]) -> int:
  """Trains, or does what a flag asks instead; returns the exit status.

  --describe prints the keys of the config, and --dry_run what the run would do.
  """
  if flags.describe is not None:
    config = cli.config_of(flags.config, overrides)
    cli.say(run_config.describe(config, flags.describe))
    return 0
  processes = flags.coordinator, flags.num_processes, flags.process_id
  options, lines = run_config.options_of(flags.config, overrides)
  if flags.dry_run:
    if any(flag is not None for flag in processes):
      cli.fail(
        '--dry_run counts for the devices of one process; leave out '
        '--coordinator, --num_processes and --process_id'
      )
    return _dry_run(flags, options, lines)
  if not flags.workdir:
    cli.fail('--workdir is missing: the folder that the run goes to')
  with (
    connected(options.distributed, *processes),
    # Errors are also reported here, as `connected` ends the process if the run
    # has several.
    cli.reported(flags.traceback),
  ):
    return _train(flags, options, lines)


def _dry_run(
  flags: argparse.Namespace, options: RunConfig, lines: Sequence[str]
) -> int:
  """Prints `lines` on ignored values, and the dry run; status 1 if refused."""
  cli.say(lines)
  trial = DryRun(
    options,
    flags.workdir,
    resume=flags.resume,
    hooks=[Distilling(flags.allow_module), *default_hooks()],
  )
  cli.say(trial.lines())
  if trial.problems:
    reasons = '\n'.join(trial.problems)
    cli.fail(f'this run would be refused:\n{reasons}')
  return 0


def _train(
  flags: argparse.Namespace, options: RunConfig, lines: Sequence[str]
) -> int:
  """Prints `lines` on ignored values, and trains; returns the exit status."""
  problem = keep_programs(flags.compile_cache)
  if is_first():
    if problem:
      cli.complain(problem)
    cli.say(lines)
  ended, distilling = Ended(), Distilling(flags.allow_module)
  try:
    train_and_evaluate(
      options,
      flags.workdir,
      hooks=[distilling, *default_hooks(), ended],
      initial=distilling.initial,
      resume=flags.resume,
    )
  except Interrupted as error:
    cli.complain(str(error))
    return cli.INTERRUPTED
  return 0 if ended.ended else cli.STOPPED


if __name__ == '__main__':
  main()
