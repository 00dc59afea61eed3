"""The definition of a study: arms on paired seeds, columns and claims.

A study is one file named after its paper and table. It states which config keys
its arms change, which numbers are the columns of its table, and to which
published differences they are compared; `command.main` does the rest:

    python -m experiments.shazeer_table6 --preset=quick
"""

import dataclasses
import functools
import itertools
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from experiments.study import jobs as jobs_lib
from experiments.study import parts
from experiments.study import rates as rates_lib
from experiments.study.jobs import Job, jobs_of
from experiments.study.parts import Arm, Column, Preset, Results, Row, Start
from experiments.study.runner import Measure, Runner, TrainingRunner
from experiments.study.tasks import TASKS, Task
from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.items import Item

# Names of the arms whose steps are timed together; ratios are to the first.
Groups = Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Exploration:
  """Preliminary runs that choose arms, or their options, as learning rates.

  Attributes:
    arms: Returns the explored arms, from the arms so far and the config that
      they share.
    chosen: Returns the arms that go on, from the arms so far, the results of
      all explored arms and the ratios of step times by timed arm.
    seeds: Seeds of the explored runs, none of which is reported.
    timed: Returns the explored arms whose steps are timed; None for none.
  """

  arms: Callable[[Sequence[Arm], ConfigDict], Sequence[Arm]]
  chosen: Callable[[Sequence[Arm], Results, Mapping[str, float]], Sequence[Arm]]
  seeds: Sequence[int]
  timed: Callable[[Sequence[Arm]], Groups] | None = None


def in_steps(preset: Preset) -> str:
  """The length of a preset's runs, in words."""
  before = f'{preset.start_steps:,} steps of pre-training, then '
  return before * bool(preset.start_steps) + f'{preset.steps:,} steps'


@dataclasses.dataclass(frozen=True)
class Study:
  """A question with its runs, its table and its claims.

  Attributes:
    name: Name of the study's file, without '.py'.
    title: The question, in a few words.
    source: Paper and table that the study reproduces.
    config: Returns the config that all arms share, for a number of steps.
    arms: Returns the arms for a preset, before it leaves any out.
    presets: The presets by name; the first is the default. 'full' is the one
      that `experiments/report.py` takes.
    columns: Columns of the table.
    claims: Claims that are tested by their text, the paper's and our own.
    figure: Description of the figure.
    rows: Returns the rows of the table, from the results of all arms and, in a
      study with `timed`, the ratios of step times by timed arm; None makes a
      row of each arm.
    starts: Returns the runs that arms begin with or learn from, for a preset;
      None where there are none. Their results are among those of the arms,
      by name of the start.
    runner: Object that makes the runs.
    measure: Function of a trained run whose numbers are added to its result;
      with one, runs are trained.
    explorations: Returns the preliminary runs of a preset, one stage after the
      other, which choose arms and their options; None for none.
    pictures: Writes further pictures to the folder of the table, from the
      results of all arms; None for none.
    timed: Names of arms whose steps are timed, interleaved, after the runs;
      those that the preset leaves out are skipped. Times are ratios to the
      first arm's. A function returns groups of such names for the reported
      arms.
    remarks: Text below the table, or a function from results to the text.
    length: Returns the length of a preset's runs, in words.
    progress: Name of the column whose number is printed as runs end; '' takes
      the first.
    tasks: Tasks that the study supports, by name; the first is the default.
    written: Date on which the claims were committed, before the runs that are
      reported, 'YYYY-MM-DD'; '' where it is not known. Later changes stand with
      each claim.
    revisions: Changes of what is run or measured since results were stored.
    rates: Learning rates that are searched for each arm, before all
      explorations, by the first column, a loss; () where none is searched.
    trial_share: Share of a run's steps that a trial of a rate has; more where
      runs learn late.
    exempt: The reason why none is searched, one of two in `rates.py`; '' where
      there is none, and claims rest on a rate that may suit one arm better.
    gates: Patterns of the texts of claims that mean nothing unless a comparison
      holds, such as 'loss: sparse < dense', by that comparison.
    earlier: Sentences on results that later ones replaced, and on claims that
      were taken out; they stay printed.
    dropped: Number of published claims that were taken out; they stay in the
      count of the overview, as claims that are not resolved.
  """

  name: str
  title: str
  source: str
  config: Callable[[int], ConfigDict]
  arms: Callable[[Preset], Sequence[Arm]]
  presets: Mapping[str, Preset]
  columns: Sequence[Column]
  claims: parts.Claims
  figure: parts.Figure
  rows: Callable[..., Sequence[Row]] | None = None
  starts: Callable[[Preset], Sequence[Start]] | None = None
  runner: Runner = TrainingRunner()
  measure: Measure | None = None
  explorations: Callable[[Preset], Sequence[Exploration]] | None = None
  pictures: Callable[[Results, pathlib.Path], None] | None = None
  timed: Sequence[str] | Callable[[Sequence[Arm]], Groups] = ()
  remarks: str | Callable[[Results], str] = ''
  length: Callable[[Preset], str] = in_steps
  progress: str = ''
  tasks: Mapping[str, Task] = dataclasses.field(default_factory=lambda: TASKS)
  written: str = ''
  revisions: Sequence[parts.Revision] = ()
  rates: Sequence[float] = ()
  trial_share: float = rates_lib.SHARE
  exempt: str = ''
  gates: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  earlier: Sequence[str] = ()
  dropped: int = 0

  def __post_init__(self):
    # An address or a comparison may be wrong.
    parts.stated({**self.claims, **{text: text for text in self.gates}})
    for pattern in itertools.chain.from_iterable(self.gates.values()):
      if not any(parts.matches(text, [pattern]) for text in self.claims):
        raise InputError(f'{self.name}: no claim is like {pattern!r} of a gate')
    if 0 < len(self.rates) < rates_lib.LEAST_RATES:
      raise InputError(
        f'{self.name}: rates={self.rates} are fewer than '
        f'{rates_lib.LEAST_RATES}'
      )
    if self.exempt not in ('', rates_lib.OPTIMIZER, rates_lib.UNTRAINED):
      reasons = rates_lib.OPTIMIZER, rates_lib.UNTRAINED
      raise unknown(f'exemption of {self.name}', self.exempt, reasons)
    if self.measure is not None:
      object.__setattr__(self, 'runner', TrainingRunner(self.measure))

  @property
  def task(self) -> str:
    """Name of the task that the study is run on by default."""
    return next(iter(self.tasks))

  @property
  def preset(self) -> str:
    """Name of the preset that the study is run with by default."""
    return next(iter(self.presets))

  def shared(self, preset: Preset, task: str = '') -> ConfigDict:
    """The config that all arms share, and change.

    Args:
      preset: Preset, which gives steps and overrides.
      task: Name of a task; '' takes the default.

    Raises:
      ValueError: There is no such task, or the overrides do not fit.
    """
    task = task or self.task
    if task not in self.tasks:
      raise unknown(f'task of {self.name}', task, self.tasks)
    config = self.config(preset.steps)
    for overrides in (self.tasks[task].overrides, preset.overrides):
      config = jobs_lib.layered(self.runner.options, config, overrides)
    return config

  def arms_of(self, preset: Preset) -> list[Arm]:
    """The arms that the preset runs."""
    return [arm for arm in self.arms(preset) if preset.keeps(arm)]

  def runs(
    self,
    preset: Preset,
    shared: ConfigDict,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    results: pathlib.Path,
    made: Results = types.MappingProxyType({}),
  ) -> list[list[Job]]:
    """The runs of arms, in the last list, after those that they begin with.

    Args:
      preset: Preset, which the runs that arms begin with depend on.
      shared: The config that all arms share.
      arms: The arms.
      seeds: The seeds.
      results: Folder of all studies' results.
      made: Results so far, as in `starts_at`.
    """
    options, levels = self.runner.options, []
    started: dict[tuple[str, int], Job] = {}
    for level in jobs_lib.in_order(self.starts_at(preset, made), arms):
      jobs = []
      for start in level:
        config = start.config(shared) if start.config else shared
        folder = results / jobs_lib.FOLDER
        jobs += jobs_of(options, config, [start.arm], seeds, folder, started)
      levels.append([dataclasses.replace(job, keeps=True) for job in jobs])
      started |= {(job.arm.name, job.seed): job for job in levels[-1]}
    output = results / self.name
    return [*levels, jobs_of(options, shared, arms, seeds, output, started)]

  def starts_at(
    self, preset: Preset, made: Results = types.MappingProxyType({})
  ) -> list[Start]:
    """The runs that arms begin with or learn from.

    Args:
      preset: The preset.
      made: Results so far; where they have the trials of a start, its rate is
        the best one.
    """
    starts = self.starts(preset) if self.starts else []
    searched = [start.arm for start in starts if start.searched]
    best = rates_lib.chosen(self.rates, searched, made, self.columns[0])
    return rates_lib.at_rates(starts, best)

  def digests(self, preset: Preset, task: str = '') -> dict[str, str]:
    """Digests of what the preset's runs are, by name of the arm or start.

    Stored results keep them: another digest says that the study runs something
    else today. They are of arms as stated, before any exploration.

    Args:
      preset: The preset.
      task: Name of a task; '' takes the default.
    """
    shared, arms = self.shared(preset, task), self.arms_of(preset)
    levels = self.runs(preset, shared, arms, [0], pathlib.Path('results'))
    options, digest = self.runner.options, jobs_lib.settings_digest
    return {j.arm.name: digest(options, j) for level in levels for j in level}

  def get_config(self, arg: str = '') -> ConfigDict:
    """The config that arms share; `moe_jax.main` calls this for a study's file.

    Args:
      arg: Name of a preset, given as `--config=experiments/<name>.py:<preset>`;
        '' takes the default.

    Raises:
      ValueError: There is no such preset.
    """
    arg = arg or self.preset
    if arg not in self.presets:
      raise unknown('preset', arg, self.presets)
    return self.shared(self.presets[arg])

  def get_items(self, preset: str = '') -> list[Item]:
    """The runs as items of `experiments.launch`.

    Their workdirs are those of the study's own command.

    Raises:
      ValueError: Arms begin with other runs, or are chosen by explorations,
        which have to come first.
    """
    preset = preset or self.preset
    chosen = self.presets[preset]
    explores = self.stages(chosen)
    if self.starts or explores:
      which = 'begin with' if self.starts else 'are chosen by'
      raise InputError(
        f'the runs of {self.name} {which} other runs; use its own command, '
        f'python -m experiments.{self.name}'
      )
    spec, seeds = f'experiments/{self.name}.py:{preset}', range(chosen.seeds)
    shared, arms = self.shared(chosen), self.arms_of(chosen)
    (jobs,) = self.runs(chosen, shared, arms, seeds, pathlib.Path('results'))
    return [
      Item(spec, {'seed': job.seed, **job.arm.overrides}, str(job.workdir))
      for job in jobs
    ]

  def stages(self, preset: Preset) -> list[Exploration]:
    """The preliminary runs of a preset, the search of rates first."""
    stages = list(self.explorations(preset) if self.explorations else [])
    if not self.rates:
      return stages

    def with_rates(arms, results, _) -> list[Arm]:
      best = rates_lib.chosen(self.rates, arms, results, self.columns[0])
      return rates_lib.at_rates(arms, best)

    trials = functools.partial(rates_lib.trials, self.rates, self.trial_share)
    stages = [Exploration(trials, with_rates, rates_lib.SEEDS), *stages]
    if starts := [s.arm for s in self.starts_at(preset) if s.searched]:
      # Students are tried with teachers that have their rates.
      first = Exploration(
        lambda _, shared: trials(starts, shared),
        lambda arms, *_: arms,
        rates_lib.SEEDS,
      )
      return [first, *stages]
    return stages

  def timed_groups(self, arms: Sequence[Arm]) -> Groups:
    """Names of the reported arms whose steps are timed, by group."""
    return self.timed(arms) if callable(self.timed) else [self.timed]

  def make_rows(
    self, arms: Sequence[Arm], results: Results, times: Mapping[str, float]
  ) -> list[Row]:
    """The rows of the table."""
    if self.rows is not None:
      return list(self.rows(results, *([times] if self.timed else [])))
    return [self.row_of(arm, results) for arm in arms]

  def row_of(self, arm: Arm, results: Results) -> Row:
    """The row of one arm."""
    values = {
      column.name: [column.of(result) for result in results[arm.name]]
      for column in self.columns
    }
    return Row(arm.name, values, arm.line, arm.x)
