"""The command line of a study: makes its runs, table, figure and verdicts."""

import argparse
import ast
import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.study import rates, results, submit, times
from experiments.study.executors import EXECUTORS, Where
from experiments.study.jobs import Job
from experiments.study.parts import Arm, Column, Results
from experiments.study.study import Study
from moe_jax import cli
from moe_jax.config import settle, unknown
from moe_jax.devices import keep_programs
from moe_jax.items import Item

_START_HELP = "steps of the runs to begin with; 0: the preset's"
_WORKERS_HELP = 'runs at a time; 0: one a core, on a cluster all'
# Flags that stand for keys of the config which each arm or run has of its own.
_OWN = {'total_steps': '--steps', 'seed': '--seeds'}
# Packages of executors, with what installs them.
_PACKAGES = {'submitit': "pip install -e '.[slurm]'", 'ray': 'pip install ray'}
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


def entries(
  study: Study, module: str
) -> tuple[Callable[..., ConfigDict], Callable[..., list[Item]]]:
  """The `get_config` and `get_items` of a study's file, its last line.

  Args:
    study: The study, whose runs are those of `moe_jax.main`.
    module: The file's `__name__`; where it is the program that is run, so is
      the study.
  """
  if module == '__main__':
    main(study)
  return study.get_config, study.get_items


@cli.reported()
def main(study: Study, argv: Sequence[str] | None = None) -> pathlib.Path:
  """Makes the missing runs and writes table, figure and verdicts.

  Explorations are run before the arms that they choose, and runs that others
  begin with before these. The results of all of them go to the study's rows,
  and the reported arms alone to the digests and configs that are kept.

  Returns:
    The folder of what was written.

  Raises:
    SystemExit: The run of `--only` is made, with status 0, or runs were
      stopped.
    ValueError: A config is wrong, or a run failed.
  """
  options = parse(study, argv)
  keep_programs()
  preset = study.presets[options.preset]
  given: dict[str, Any] = {
    name: size
    for name in ('seeds', 'steps', 'start_steps')
    if (size := getattr(options, name))
  }
  preset = dataclasses.replace(preset, **given)
  if options.task != study.task:
    given['task'] = options.task
  changed = [f'--{name}={value}' for name, value in given.items()]
  changed += options.flags
  preset_argument = [f'--preset={options.preset}'] * (len(study.presets) > 1)
  arguments = [*preset_argument, *changed]
  command = ['python', '-m', f'experiments.{study.name}', *arguments]
  command.append(f'--output={options.output}')

  output = pathlib.Path(options.output) / study.name
  shared = study.shared(preset, options.task)
  flagged = cli.config_of(shared, options.flags)
  names = [cli.name_of(flag) for flag in options.flags]
  shared, _ = settle(study.runner.options, flagged, names)
  where = Where(options.executor, options.workers, dict(options.resource))
  progress = next(c for c in study.columns if study.progress in ('', c.name))
  made: Results = {}
  run_names: list[str] = []

  def run(arms: Sequence[Arm], seeds: Sequence[int], last: bool) -> list[Job]:
    """Makes the runs of arms, the last ones or explored; adds all results."""
    levels = study.runs(preset, shared, arms, seeds, output.parent, made)
    run_names.extend(job.name for level in levels for job in level)
    if last and options.only not in ('', *run_names):
      raise unknown('run of --only', options.only, run_names)
    for level in levels:
      alone = [job for job in level if job.name == options.only]
      column = progress if level is levels[-1] else _START_COLUMN
      submit.run_all(study.runner, alone or level, column, where, command)
      if alone:
        raise SystemExit(0)
      made.update(submit.read_all(level))
    return levels[-1]

  arms, timed = study.arms_of(preset), {}
  for stage in study.stages(preset):
    trial_arms = stage.arms(arms, shared)
    jobs = run(trial_arms, stage.seeds, last=False)
    if stage.timed is not None:
      timed |= times.step_times(stage.timed(trial_arms), jobs, output)
    arms = stage.chosen(arms, made, timed)
  jobs = run(arms, range(preset.seeds), last=True)
  searched = [s for s in study.starts_at(preset, made) if s.searched]
  groups = study.timed_groups(arms)
  timed |= times.step_times(groups, jobs, output, preset.bursts)
  summary = results.summary_of(
    study,
    preset,
    study.tasks[options.task],
    study.make_rows(arms, made, timed),
    made,
    timed,
    arguments=arguments,
    configs=study.digests(preset, options.task),
    rates={
      run.name: run.overrides[rates.KEY]
      for run in (*searched, *arms)
      if rates.KEY in run.overrides
    },
  )
  configs = {job.arm.name: job.config for job in jobs if not job.seed}
  words = [word[1:].replace('/', '_') for word in changed]
  folder = output / ''.join([options.preset, *words])
  text = results.write(folder, study.figure, summary, configs)
  if study.pictures is not None:
    study.pictures(made, folder)
  print(f'\n{text}\nwritten: {folder}')
  return folder
