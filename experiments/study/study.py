"""A study: arms on paired seeds, what is measured, what is claimed of it.

A study is one file named after its paper and table. It says which config keys
its arms change, which numbers make a column, and which published differences
they are held against; `main` does the rest:

    python -m experiments.shazeer_table6 --preset=quick

Not here: how runs are made (`scheduled_runs.py`), what becomes of their numbers
(`results.py`), and what has been published (`claims.py`).
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from experiments.launch import Item
from experiments.study import claims, scheduled_runs
from experiments.study import results as study_results
from experiments.study import times as study_times
from experiments.study.sweeps import nested
from experiments.study.tasks import TASKS, Task
from moe_jax import command_line, host
from moe_jax.config import merge, unknown
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

Result = dict[str, Any]  # the last row of each key of a run
Results = dict[str, list[Result]]  # by arm, one a seed


@dataclasses.dataclass(frozen=True)
class Arm:
  """One kind of run.

  Attributes:
    name: Of its row.
    overrides: What it changes in the study's config, by dotted name.
    line: Which line of the figure it is a point of.
    x: Where on that line; None: a level across the figure.
  """

  name: str
  overrides: Mapping[str, Any]
  line: str = ''
  x: float | None = None


@dataclasses.dataclass(frozen=True)
class Preset:
  """How long a study is.

  Attributes:
    steps: Optimizer steps of a run.
    seeds: How many, from 0.
    overrides: Of all arms, by dotted name.
    without: Arms that it leaves out, by name; `*` for any text.
  """

  steps: int
  seeds: int
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  without: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Column:
  """A number of every row.

  Attributes:
    name: Its heading.
    key: Of a run's metrics, `*` for any text: the mean over those that match;
      '' for what `Study.rows` fills.
    unit: For example 'nats/byte'; '' for a plain number.
    digits: After the point.
    each: What is made of each of them before the mean.
  """

  name: str
  key: str = ''
  unit: str = ''
  digits: int = 4
  each: Callable[[float], float] = float

  def of(self, result: Result) -> float:
    """Its value in one run; NaN where the run has none, as a dense twin."""
    found = [
      self.each(value)
      for key, value in result.items()
      if fnmatch.fnmatchcase(key, self.key)
    ]
    return float(np.mean(found)) if found else float('nan')


@dataclasses.dataclass(frozen=True)
class Row:
  """What a table and a claim compare.

  Attributes:
    name: Of the arm, or of whatever the study makes of several.
    values: By column, one a seed; a column that it lacks has none.
    line: See `Arm`.
    x: See `Arm`.
  """

  name: str
  values: Mapping[str, Sequence[float]]
  line: str = ''
  x: float | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
  """A published direction, and the two rows here that should show it.

  Attributes:
    text: What the paper says.
    compared: 'loss: top-2 < dense' or 'loss: top-2 > 1.5': the column, the row
      and the other row or number.
    published: Addresses in `claims.json`, of the row and of the other.
    note: Why the comparison differs from the paper's; '' where it does not.
    column: The three of `compared`,
    row: and
    than: a number where it is one.
    direction: 'lower' or 'higher'.

  Raises:
    ValueError: `compared` is not of that form, or an address is unknown.
  """

  text: str
  compared: str
  published: Sequence[str] = ()
  note: str = ''
  column: str = dataclasses.field(init=False)
  row: str = dataclasses.field(init=False)
  than: str | float = dataclasses.field(init=False)
  direction: str = dataclasses.field(init=False)

  def __post_init__(self):
    found = re.fullmatch('([^:]+): (.+) ([<>]) (.+)', self.compared)
    if not found:
      raise ValueError(
        f"{self.compared!r} is not 'column: row < row or number'"
      )
    column, row, sign, than = found.groups()
    with contextlib.suppress(ValueError):
      than = float(than)
    direction = 'lower' if sign == '<' else 'higher'
    values = dict(column=column, row=row, than=than, direction=direction)
    for name, value in values.items():
      object.__setattr__(self, name, value)
    for address in self.published:
      claims.find(address)


@dataclasses.dataclass(frozen=True)
class Figure:
  """What is drawn: a panel a column, its rows' means and intervals.

  Attributes:
    columns: The panels.
    x_label: What the rows' `x` is; '' where they have none.
    log_x: Whether it has a logarithmic axis.
  """

  columns: Sequence[str]
  x_label: str = ''
  log_x: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
  """See the module.

  Attributes:
    name: Of its file.
    title: The question.
    source: Paper and table.
    config: What all arms share, of so many steps.
    arms: Of a preset; see `arms_of`.
    presets: 'quick' (ten minutes on two cores) and 'full' (45 at most).
    columns: Of the table.
    claims: Of the paper.
    figure: What to draw.
    rows: From the results to the table's rows, where those are not the arms;
      the second argument is every timed arm's time a step over the first's.
    measure: Taken from every trained run beside its metrics.
    pictures: Writes more of them into the folder of the table.
    timed: Names of arms whose steps are timed, interleaved, after the runs, if
      the preset has them; the others' are ratios to the first's.
    remarks: Said below the table.
    tasks: What it can be run on; the first, unless another is asked for.
  """

  name: str
  title: str
  source: str
  config: Callable[[int], ml_collections.ConfigDict]
  arms: Callable[[Preset], Sequence[Arm]]
  presets: Mapping[str, Preset]
  columns: Sequence[Column]
  claims: Sequence[Claim]
  figure: Figure
  rows: Callable[[Results, Mapping[str, float]], Sequence[Row]] | None = None
  measure: Callable[[Run, TrainState], Mapping[str, Any]] | None = None
  pictures: Callable[[Results, pathlib.Path], None] | None = None
  timed: Sequence[str] = ()
  remarks: str = ''
  tasks: Mapping[str, Task] = dataclasses.field(default_factory=lambda: TASKS)

  @property
  def task(self) -> str:
    """What it is run on where nothing else is asked for."""
    return next(iter(self.tasks))

  def shared(self, preset: Preset, task: str = '') -> ml_collections.ConfigDict:
    """The config that arms change.

    Args:
      preset: Steps and overrides.
      task: Of `tasks`; '': `self.task`.

    Raises:
      ValueError: It has no such task; or see `config.merge`.
    """
    task = task or self.task
    if task not in self.tasks:
      raise unknown(f'task of {self.name}', task, self.tasks)
    config = self.config(preset.steps)
    for overrides in (self.tasks[task].overrides, preset.overrides):
      config = merge(config, nested(overrides))
    return config

  def arms_of(self, preset: Preset) -> list[Arm]:
    """Those that the preset runs."""

    def left_out(arm: Arm) -> bool:
      return any(fnmatch.fnmatchcase(arm.name, p) for p in preset.without)

    return [arm for arm in self.arms(preset) if not left_out(arm)]

  def get_config(self, arg: str = 'quick') -> ml_collections.ConfigDict:
    """As a config file's: `experiments/<name>.py:<preset>`."""
    if arg not in self.presets:
      raise unknown('preset', arg, self.presets)
    return self.shared(self.presets[arg])

  def get_items(self, preset: str = 'quick') -> list[Item]:
    """Its runs for `experiments.launch`, in the folders where it looks."""
    chosen = self.presets[preset]
    arms = self.arms_of(chosen)
    shared = self.shared(chosen)
    output = pathlib.Path('results') / self.name
    items = []
    for job in scheduled_runs.jobs(shared, arms, range(chosen.seeds), output):
      overrides = {'seed': job.seed, **job.arm.overrides}
      spec = f'experiments/{self.name}.py:{preset}'
      items.append(Item(spec, overrides, str(job.workdir)))
    return items

  def make_rows(
    self, arms: Sequence[Arm], results: Results, times: Mapping[str, float]
  ) -> list[Row]:
    """The table's rows."""
    if self.rows is not None:
      return list(self.rows(results, times))
    return [self.row_of(arm, results) for arm in arms]

  def row_of(self, arm: Arm, results: Results) -> Row:
    """An arm's."""
    values = {
      column.name: [column.of(result) for result in results[arm.name]]
      for column in self.columns
    }
    return Row(arm.name, values, arm.line, arm.x)


def parse(study: Study, argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog=f'python -m experiments.{study.name}', description=study.title
  )
  add = parser.add_argument
  add('--preset', default='quick', choices=list(study.presets), help='length')
  add('--seeds', type=int, default=0, help="how many; 0: the preset's")
  add('--steps', type=int, default=0, help="of a run; 0: the preset's")
  add('--workers', type=int, default=0, help='runs at a time; 0: one a core')
  add('--task', default=study.task, choices=list(study.tasks), help='data')
  add('--output', default='results', help='where results and runs go')
  options = parser.parse_args(argv)
  for name in ('seeds', 'steps', 'workers'):
    if getattr(options, name) < 0:
      parser.error(f'--{name}={getattr(options, name)} is negative')
  return options


def main(study: Study, argv: Sequence[str] | None = None) -> pathlib.Path:
  """Runs what is missing, writes table, figure and verdicts; their folder."""
  options = parse(study, argv)
  host.keep_freed_memory()
  preset = study.presets[options.preset]
  preset = dataclasses.replace(
    preset,
    steps=options.steps or preset.steps,
    seeds=options.seeds or preset.seeds,
  )
  changed = [
    f'--{name}={value}'
    for name in ('seeds', 'steps', 'task')
    if (value := getattr(options, name)) not in (0, study.task)
  ]
  label = options.preset + ''.join(option[1:] for option in changed)
  output = pathlib.Path(options.output) / study.name
  try:
    shared, arms = study.shared(preset, options.task), study.arms_of(preset)
    jobs = scheduled_runs.jobs(shared, arms, range(preset.seeds), output)
  except ValueError as error:
    command_line.fail(str(error))
  try:
    scheduled_runs.run_all(study, jobs, options.workers)
    results = scheduled_runs.read_all(jobs)
  except ValueError as error:
    command_line.fail(str(error))
  times = study_times.step_times(study, jobs, output)
  medians = {name: spread.median for name, spread in times.items()}
  rows = study.make_rows(arms, results, medians)
  task = study.tasks[options.task]
  found = study_results.found(study, preset, task, rows, results, times)
  found['arguments'] = [f'--preset={options.preset}', *changed]
  configs = {job.arm.name: job.config for job in jobs if not job.seed}
  folder = output / label
  text = study_results.write(folder, study, found, configs)
  if study.pictures is not None:
    study.pictures(results, folder)
  print(f'\n{text}\nwritten: {folder}')
  return folder
