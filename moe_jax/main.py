"""Trains and evaluates the model that a config describes.

    python -m moe_jax.main --config=moe_jax:tiny_switch --workdir=runs/tiny
    python -m moe_jax.main --config=moe_jax:tiny_switch \
      --workdir=runs/tiny16 --config.model.moe.num_experts=16
    python -m moe_jax.main --config=moe_jax:tiny_switch --describe
    python -m moe_jax.main --config=moe_jax:tiny_switch \
      --workdir=runs/tiny --dry_run

The last two commands train nothing. The first of them prints every key of the
config with its value, its default and what it means; the second what the run
would cost, need and do, with status 1 if it would be refused.

On several hosts the same command is started on each. The environment says which
process it is (SLURM, Open MPI, TPU pods, GKE), or flags do:

      --coordinator=host0:9876 --num_processes=2 --process_id=0

SIGTERM and Ctrl-C save after the present step, and the same command goes on
from there; a second Ctrl-C stops at once. Exit status: 0 after the last step or
an early end; 75 if SIGTERM stopped the run before it; 130 after Ctrl-C; 1 with
a message of what is wrong.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

from absl import app, flags, logging
from ml_collections import config_flags

from moe_jax import cli, run_config
from moe_jax.analysis import dry_run
from moe_jax.analysis.hooks import default_hooks
from moe_jax.compression.distill import Distilling
from moe_jax.devices import (
  PROGRAMS_HELP,
  connected,
  is_first,
  keep_freed_memory,
  keep_programs,
)
from moe_jax.errors import InputError
from moe_jax.training.loop import Interrupted, train_and_evaluate
from moe_jax.training.setup import Ended

config_flags.DEFINE_config_file(
  'config',
  None,
  'Path of a config file, own.py, or name of one, moe_jax:tiny_switch; '
  '--config.seed=1 overrides a value.',
  # New keys belong to open sections; `cli.parse` refuses all others.
  accept_new_attributes=True,
  lock_config=False,
)
flags.mark_flag_as_required('config')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder for checkpoints, metrics and reports of the run.'
)
_RESUME = flags.DEFINE_bool(
  'resume', False, 'Go on in a workdir whose config differs.'
)
_TRACEBACK = flags.DEFINE_bool(
  'traceback', False, 'Show where in the code an error came from.'
)
_DESCRIBE = flags.DEFINE_bool(
  'describe', False, 'Print every key of the config, and train nothing.'
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run',
  False,
  'Print what the run would cost, need and do; train and write nothing.',
)
_ALLOW_MODULE = flags.DEFINE_multi_string(
  'allow_module',
  [],
  'A module or package from which the run in --config.init_from.workdir or '
  '--config.distill.teacher may import classes; repeatable. Classes that '
  '--config names are always allowed.',
)
_COMPILE_CACHE = flags.DEFINE_string('compile_cache', '', PROGRAMS_HELP)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'host:port of process 0, for several processes.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes that train together.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Number of this process, from 0.'
)


def main(argv: list[str]) -> None:
  """Runs the command; errors are reported in a few lines."""
  if len(argv) > 1:
    cli.fail(f'unexpected arguments {argv[1:]}; options begin with --')
  logging.set_verbosity(logging.WARNING)
  keep_freed_memory()
  cli.ignore_closed_loops()
  if _DESCRIBE.value:
    cli.say(run_config.describe(flags.FLAGS.config))
    return
  processes = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if _DRY_RUN.value:
    if any(flag is not None for flag in processes):
      cli.fail(
        '--dry_run counts for the devices of one process; leave out '
        '--coordinator, --num_processes and --process_id'
      )
    with cli.reported(_TRACEBACK.value):
      _dry_run()
    return
  if not _WORKDIR.value:
    cli.fail('--workdir is missing: the folder that the run goes to')
  with cli.reported(_TRACEBACK.value):
    options, ignored = read_config()
    with (
      connected(options.distributed, *processes),
      # Once more, as a process of several ends within `connected`.
      cli.reported(_TRACEBACK.value),
    ):
      status = _train(options, ignored)
  if status:
    sys.exit(status)


def read_config() -> tuple[run_config.RunConfig, dict[str, Any]]:
  """The options of the command line, and values of the file that are ignored.

  Errors are those of `run_config.settled`.
  """
  config = cli.load_config(_config_spec())
  return run_config.settled(config, flags.FLAGS.config)


def _config_spec() -> str:
  """The config's path or name, with the argument behind its colon."""
  return config_flags.get_config_filename(flags.FLAGS['config'])


def replaced_lines() -> Iterator[str]:
  """A line for each part of the data that ':runlocal' has replaced."""
  base_spec, _, argument = _config_spec().rpartition(':')
  if argument != 'runlocal':
    return
  before, after = (
    cli.flatten(cli.load_config(spec).data)
    for spec in (base_spec, f'{base_spec}:runlocal')
  )
  chosen_values = cli.flatten(flags.FLAGS.config.data)
  for key, new in after.items():
    old = before.get(key, new)
    if key.endswith('kind') and old != new == chosen_values.get(key):
      yield f'runlocal: data.{key} {old!r} -> {new!r}'


def other_problems(argv: Sequence[str]) -> list[str]:
  """The problems of a command line beside keys that do not exist."""
  try:
    run_config.options_of(*cli.known_flags(argv))
  except InputError as error:
    return str(error).splitlines()
  return []


def _dry_run() -> None:
  """Prints what a run would do; fails if it would be refused."""
  options, ignored = read_config()
  cli.say(replaced_lines())
  cli.say(run_config.ignored_lines(ignored))
  trial = dry_run.DryRun(
    options,
    _WORKDIR.value or '',
    resume=_RESUME.value,
    hooks=[Distilling(_ALLOW_MODULE.value), *default_hooks()],
  )
  cli.say(trial.lines())
  if trial.problems:
    reasons = '\n'.join(trial.problems)
    cli.fail(f'this run would be refused:\n{reasons}')


def _train(options: run_config.RunConfig, ignored: dict[str, Any]) -> int:
  """Trains; returns the exit status."""
  problem = keep_programs(_COMPILE_CACHE.value)
  if is_first():
    if problem:
      cli.complain(problem)
    cli.say(replaced_lines())
    cli.say(run_config.ignored_lines(ignored))
  ended, distilling = Ended(), Distilling(_ALLOW_MODULE.value)
  try:
    train_and_evaluate(
      options,
      cast(str, _WORKDIR.value),
      hooks=[distilling, *default_hooks(), ended],
      initial=distilling.initial,
      resume=_RESUME.value,
    )
  except Interrupted as error:
    cli.complain(str(error))
    return cli.INTERRUPTED
  return 0 if ended.ended else cli.STOPPED


def command() -> None:
  """Runs the command line of this program."""
  app.run(
    main,
    flags_parser=lambda argv: cli.parse(argv, __doc__, other_problems),
  )


if __name__ == '__main__':
  command()
