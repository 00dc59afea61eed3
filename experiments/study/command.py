"""The command line of a study: makes its runs, table, figure and verdicts."""

import argparse
import ast
import dataclasses
import importlib.util
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study import results, submit, times
from experiments.study.executors import EXECUTORS, Where
from experiments.study.jobs import Job
from experiments.study.parts import Arm, Column, Preset, Results
from experiments.study.starts import started
from experiments.study.study import Study
from moe_jax import cli
from moe_jax.config import settle, unknown

_START_HELP = "steps of the runs to begin with; 0: the preset's"
_WORKERS_HELP = 'runs at a time; 0: one a core, on a cluster all'
# Flags that stand for keys of the config which each arm or run has of its own.
_OWN = {'total_steps': '--steps', 'seed': '--seeds'}
# Packages of executors, with what installs them.
_PACKAGES = {
  'submitit': "pip install -e '.[slurm]'",
  'ray': 'pip install ray',
}
# The number that is printed when a run ends that others begin with.
_START_COLUMN = Column('loss in training', 'train/loss')


def parse(study: Study, argv: Sequence[str] | None) -> argparse.Namespace:
  """The parsed command line; its `flags` change the config that arms share."""
  parser = cli.Parser(
    prog=f'python -m experiments.{study.name}',
    description=study.title,
    epilog='Keys of the config that all arms share can be changed: '
    '--config.batch_size=8',
    allow_abbrev=False,
  )
  add = parser.add_argument
  names, count = list(study.presets), cli.NOT_NEGATIVE
  add('--preset', default=study.preset, choices=names, help='size of the study')
  add('--seeds', type=count, default=0, help="number of seeds; 0: the preset's")
  add('--steps', type=count, default=0, help="steps of a run; 0: the preset's")
  start_help = argparse.SUPPRESS if study.starts is None else _START_HELP
  add('--start_steps', type=count, default=0, help=start_help)
  add('--workers', type=count, default=0, help=_WORKERS_HELP)
  add('--executor', default='pool', choices=EXECUTORS, help='what runs them')
  add(
    '--resource',
    type=_resource,
    action='append',
    default=[],
    metavar='KEY=VALUE',
    help='what a run needs of a cluster: slurm_partition=gpu, num_gpus=1',
  )
  add('--only', default='', metavar='RUN', help='name of one run to make alone')
  add('--task', default=study.task, choices=list(study.tasks), help='data set')
  add('--output', default='results', help='folder of results and runs')
  options, options.flags = parser.parse_known_args(argv)
  if options.start_steps and study.starts is None:
    parser.error(f'--start_steps: no run of {study.name} begins with another')
  if options.resource and options.executor == 'pool':
    parser.error('--resource: a pool of this machine has none to choose')
  install = _PACKAGES.get(options.executor)
  if install and importlib.util.find_spec(options.executor) is None:
    parser.error(f'--executor={options.executor} is not installed; {install}')
  for flag in options.flags:
    if not re.match(r'--config\.[\w.]+=', flag):
      parser.error(f'unknown argument {flag!r}; keys are --config.KEY=VALUE')
    key = flag.removeprefix('--config.').partition('=')[0]
    if key in _OWN:
      parser.error(f'{flag}: runs do not share {key}; give {_OWN[key]}')
  return options


def _resource(text: str) -> tuple[str, Any]:
  """A key and its value, which is text unless it reads as a literal."""
  key, equals, value = text.partition('=')
  if not equals or not key:
    raise argparse.ArgumentTypeError(f'{text!r} is not KEY=VALUE')
  try:
    return key, ast.literal_eval(value)
  except (SyntaxError, ValueError):
    return key, value


@cli.reported()
def main(study: Study, argv: Sequence[str] | None = None) -> pathlib.Path:
  """Makes the missing runs and writes table, figure and verdicts.

  Returns:
    The folder of what was written.

  Raises:
    SystemExit: The run of `--only` is made, with status 0, or runs were
      stopped.
  """
  options = parse(study, argv)
  preset = study.presets[options.preset]
  preset = dataclasses.replace(
    preset,
    steps=options.steps or preset.steps,
    seeds=options.seeds or preset.seeds,
    start_steps=options.start_steps or preset.start_steps,
  )
  runs = _run(study, preset, options)
  output = pathlib.Path(options.output) / study.name
  groups = study.timed_groups(runs.arms)
  timed = {
    **runs.times,
    **times.step_times(groups, runs.jobs, output, preset.bursts),
  }
  rows = study.make_rows(runs.arms, runs.results, timed)
  summary = results.summary_of(
    study,
    preset,
    study.tasks[options.task],
    rows,
    runs.results,
    timed,
    arguments=_arguments(study, options),
    configs=study.digests(preset, options.task),
  )
  configs = {job.arm.name: job.config for job in runs.jobs if not job.seed}
  words = [word[1:].replace('/', '_') for word in _changed(study, options)]
  folder = output / ''.join([options.preset, *words])
  text = results.write(folder, study.figure, summary, configs)
  if study.pictures is not None:
    study.pictures(runs.results, folder)
  print(f'\n{text}\nwritten: {folder}')
  return folder


@dataclasses.dataclass(frozen=True)
class _Runs:
  """The reported arms and their runs, and the results of all runs.

  The results include those of explored arms, which are not reported, and of the
  runs that arms begin with; the step times are those of explored arms.
  """

  arms: Sequence[Arm]
  jobs: Sequence[Job]
  results: Results
  times: Mapping[str, times.StepTime]


def _run(study: Study, preset: Preset, options: argparse.Namespace) -> _Runs:
  """Makes the runs that are missing, explored ones first, and reads all.

  Raises:
    ValueError: A config is wrong, or a run failed.
  """
  output = pathlib.Path(options.output) / study.name
  shared = study.shared(preset, options.task)
  flagged = cli.config_of(shared, options.flags)
  given = list(map(cli.name_of, options.flags))
  shared, _ = settle(study.runner.options, flagged, given)
  arms = study.arms_of(preset)
  where = Where(options.executor, options.workers, dict(options.resource))
  command = _command(study, options)
  progress = next(c for c in study.columns if study.progress in ('', c.name))
  start_results: Results = {}
  names: list[str] = []

  def make(jobs: Sequence[Job], column: Column) -> None:
    names.extend(job.name for job in jobs)
    is_last = options.only in names
    if is_last:
      jobs = [job for job in jobs if job.name == options.only]
    submit.run_all(study.runner, jobs, column, where, command)
    if is_last:
      raise SystemExit(0)

  def run(arms: Sequence[Arm], seeds: Sequence[int]) -> list[Job]:
    first = study.start_jobs(preset, shared, arms, seeds, output.parent)
    jobs = study.jobs(shared, arms, seeds, output, started(first))
    if options.only and not study.explorations:
      all_names = [job.name for job in itertools.chain(*first, jobs)]
      if options.only not in all_names:
        raise unknown('run of --only', options.only, all_names)
    for level in first:
      make(level, _START_COLUMN)
      start_results.update(submit.read_all(level))
    make(jobs, progress)
    return jobs

  explored: Results = {}
  timed: dict[str, times.StepTime] = {}
  for stage in study.explorations(preset) if study.explorations else []:
    trial_arms = stage.arms(arms, shared)
    jobs = run(trial_arms, stage.seeds)
    explored = {**explored, **submit.read_all(jobs)}
    if stage.timed is not None:
      timed |= times.step_times(stage.timed(trial_arms), jobs, output)
    arms = stage.chosen(arms, explored, timed)
  jobs = run(arms, range(preset.seeds))
  if options.only:  # of an arm that the explorations did not choose
    raise unknown('run of --only', options.only, names)
  results = {**explored, **start_results, **submit.read_all(jobs)}
  return _Runs(arms, jobs, results, timed)


def _changed(study: Study, options: argparse.Namespace) -> list[str]:
  """Arguments, other than the preset, that differ from their defaults."""
  arguments = [
    f'--{name}={value}'
    for name in ('seeds', 'steps', 'start_steps', 'task')
    if (value := getattr(options, name)) not in (0, study.task)
  ]
  return [*arguments, *options.flags]


def _arguments(study: Study, options: argparse.Namespace) -> list[str]:
  """Arguments of the command that reproduces the table."""
  preset_argument = [f'--preset={options.preset}'] * (len(study.presets) > 1)
  return [*preset_argument, *_changed(study, options)]


def _command(study: Study, options: argparse.Namespace) -> list[str]:
  """Words of the command that makes the runs in the same folder."""
  words = ['python', '-m', f'experiments.{study.name}']
  words += [*_arguments(study, options), f'--output={options.output}']
  return words
