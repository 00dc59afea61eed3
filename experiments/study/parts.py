"""The parts of a study: arms, presets, columns, rows, claims, a figure."""

import contextlib
import dataclasses
import fnmatch
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.study import claims
from moe_jax.errors import InputError

# The result of one run: the last value of each of its metrics, by name.
Result = Mapping[str, Any]
# The results of every arm, by the arm's name, in the order of the seeds.
Results = Mapping[str, Sequence[Result]]
# Makes the folder of a new run from that of a trained one, change(run, new),
# and returns numbers about it. It is a function of a module, or a `partial` of
# one with plain arguments: other processes receive it, and its text is hashed.
Change = Callable[[pathlib.Path, pathlib.Path], Mapping[str, float]]
# Bounds of a column: any number, a loss or another positive one, a share in %.
ANY, POSITIVE, SHARE = (-np.inf, np.inf), (0.0, np.inf), (0.0, 100.0)


def matches(name: str, patterns: Sequence[str]) -> bool:
  """Whether a name is like any pattern, in which `*` stands for any text."""
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class Arm:
  """One of the configurations that a study compares, each run on all seeds.

  Attributes:
    name: Name of the arm's row.
    overrides: Values that the arm changes in the study's config, by dotted
      name; they may choose another kind for a section (see `jobs.layered`).
    line: Name of the figure's line on which the arm is a point.
    x: Coordinate of the point along the x axis; None draws a horizontal line.
    start: Name of the `Start` whose parameters the runs begin with; '' draws
      them from the seed.
    change: Function that makes the arm's runs from those of its start, instead
      of training (see `runner.py`); None trains.
    teacher: Name of the start that teaches the runs (`config.distill`); '' for
      none.
    rate_of: Name of the arm whose searched learning rate the runs take; ''
      searches one for them.
  """

  name: str
  overrides: Mapping[str, Any]
  line: str = ''
  x: float | None = None
  start: str = ''
  change: Change | None = None
  teacher: str = ''
  rate_of: str = ''

  def __post_init__(self):
    if self.change is not None and not self.start:
      raise InputError(f'arm {self.name!r} changes a run, but names no start')

  @property
  def runs_before(self) -> dict[str, str]:
    """Names of the starts that the runs need, by the key of their folder."""
    starts = {'init_from.workdir': self.start, 'distill.teacher': self.teacher}
    return {key: name for key, name in starts.items() if name}


@dataclasses.dataclass(frozen=True)
class Start:
  """A run that arms begin with or learn from, or other starts begin with.

  Attributes:
    name: Name by which an arm chooses it.
    config: Returns the config of the run, from the config that all arms share;
      None takes that.
    start: Name of the start that this one begins with; '' draws parameters.
    change: Function that makes the run from that start, as in `Arm`.
    teacher: Name of the start that teaches the run; '' for none.
    overrides: Values that the run changes in that config, by dotted name.
    searched: Whether its learning rate is searched before those of arms; it
      then has no `config`.
  """

  name: str
  config: Callable[[ConfigDict], ConfigDict] | None = None
  start: str = ''
  change: Change | None = None
  teacher: str = ''
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  searched: bool = False

  @property
  def arm(self) -> Arm:
    """The arm whose runs are those of the start."""
    before = {'start': self.start, 'teacher': self.teacher}
    return Arm(self.name, self.overrides, change=self.change, **before)


@dataclasses.dataclass(frozen=True)
class Revision:
  """A change of what a study runs or measures, after results were stored.

  Results from before its date are marked, and the verdicts that rest on them
  are withheld until the study has run again.

  Attributes:
    date: Date of the change, 'YYYY-MM-DD'. Results of that day count as
      older unless they keep digests of their configs.
    what: One or two sentences on what is different since then.
    rows: Patterns of names of the rows that it changes; `*` stands for any
      text.
    columns: Patterns of names of the columns that it changes.
  """

  date: str
  what: str
  rows: Sequence[str] = ('*',)
  columns: Sequence[str] = ('*',)

  def concerns(self, row: str, column: str) -> bool:
    """Whether the number of a row and column is another since the change."""
    return matches(row, self.rows) and matches(column, self.columns)


@dataclasses.dataclass(frozen=True)
class Preset:
  """The size of a study: its steps and seeds, and which arms it has.

  Attributes:
    steps: Number of optimizer steps of a run.
    seeds: Number of seeds, which are counted from 0.
    overrides: Values that all arms change in the study's config, by dotted
      name.
    without: Patterns of names of arms that are left out; `*` stands for any
      text.
    start_steps: Number of optimizer steps of the runs that the arms begin with;
      0 where they begin with none.
    burst_for_each_seed: Whether steps are timed in as many bursts as there are
      seeds, for intervals that hold both; otherwise in one.
    underpowered: The reason why runs of this size can decide no claim; '' where
      they can. Verdicts are withheld for it.
    seeds_seen: Number of the first seeds whose results were known when the
      others were added. They stand in the table and decide gates, which are no
      findings; the others alone decide claims.
  """

  steps: int
  seeds: int
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  without: Sequence[str] = ()
  start_steps: int = 0
  burst_for_each_seed: bool = False
  underpowered: str = ''
  seeds_seen: int = 0

  @property
  def bursts(self) -> int:
    """Number of bursts in which the steps of reported arms are timed."""
    return self.seeds if self.burst_for_each_seed else 1

  def keeps(self, arm: Arm) -> bool:
    """Whether the preset has the arm."""
    return not matches(arm.name, self.without)


def trial(
  steps: int,
  seeds: int,
  without: Sequence[str] = (),
  why: str = 'routers have hardly begun to differ',
) -> Preset:
  """A preset so short that it decides no claim, with the reason."""
  reason = f'after {steps} steps {why}'
  return Preset(steps, seeds, without=without, underpowered=reason)


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of the table.

  Attributes:
    name: Heading of the column.
    key: Name of the metric of a run that the column shows. With `*`, which
      stands for any text, it shows the mean of the metrics that match. '' where
      `Study.rows` computes the number.
    unit: Unit of the number, such as 'nats/byte'; '' for a plain number.
    digits: Number of digits printed after the decimal point.
    each: Function that is applied to each metric before the mean.
    bounds: Smallest and largest possible number, such as `SHARE`; intervals do
      not go beyond them.
  """

  name: str
  key: str = ''
  unit: str = ''
  digits: int = 4
  each: Callable[[float], float] = float
  bounds: tuple[float, float] = ANY

  def of(self, result: Result) -> float:
    """The number of one run; NaN where the run has no such metric."""
    values = [
      self.each(value)
      for key, value in result.items()
      if fnmatch.fnmatchcase(key, self.key)
    ]
    return float(np.mean(values)) if values else float('nan')


def percent(
  name: str,
  key: str,
  unit: str = '%',
  digits: int = 1,
  bounds: tuple[float, float] = SHARE,
) -> Column:
  """A column of a metric that is a share, in per cent; see `Column`."""
  return Column(name, key, unit, digits, lambda x: 100 * x, bounds)


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table; claims compare rows.

  Attributes:
    name: Name of the row: that of its arm, or another where the study computes
      rows from several arms.
    values: Numbers by name of column, one for each seed; a missing column stays
      empty.
    line: Name of the figure's line, as in `Arm`.
    x: Coordinate along the x axis, as in `Arm`.
    difference: Whether the numbers are differences between two rows, which the
      bounds of a column do not concern.
  """

  name: str
  values: Mapping[str, Sequence[float]]
  line: str = ''
  x: float | None = None
  difference: bool = False

  def plus(self, values: Mapping[str, Sequence[float]]) -> 'Row':
    """The row with the numbers of further columns."""
    return dataclasses.replace(self, values={**self.values, **values})

  def without_first(self, seeds: int) -> 'Row':
    """The row without the numbers of so many first seeds."""
    values = {name: numbers[seeds:] for name, numbers in self.values.items()}
    return dataclasses.replace(self, values=values)


def row_of(
  name: str,
  runs: Sequence[Result],
  columns: Sequence[Column],
  line: str = '',
  x: float | None = None,
) -> Row:
  """The row of an arm's runs, without columns of which a run has no number."""
  values = {column.name: [*map(column.of, runs)] for column in columns}
  shown = {k: v for k, v in values.items() if not np.isnan(v).any()}
  return Row(name, shown, line, x)


def more_seeds(before: str, date: str) -> str:
  """The change of a claim that seeds added after a look have judged otherwise.

  Args:
    before: The verdict and the interval with the earlier seeds, in words.
    date: The day on which seeds were added; see `Preset.seeds_seen`.
  """
  return f'{before}; when that was known, on {date}, others were added.'


@dataclasses.dataclass(frozen=True)
class Claim:
  """A published direction, and the two rows here that should show it.

  Attributes:
    compared: The comparison, 'loss: top-2 < dense' or 'loss: top-2 > 1.5': the
      column, the row, and the other row or a number. A claim that two rows do
      not differ says by how much they may: 'loss: top-2 = top-1 within 0.01'.
    published: Addresses in `claims.json` of the two published numbers.
    note: Difference of the comparison from the paper's; '' where there is none.
    changes: Sentences that the table prints, one for each change of the claim
      after it was first written, with its date and whether results were known.
    withheld: Reason why the study's arms, as they are, cannot decide the claim;
      '' where they can.
    column: Name of the column that is compared.
    row: Name of the row that is compared.
    than: Name of the other row, or the number.
    direction: Where the claim has the row's number, 'lower', 'higher' or
      'equal'.
    within: Largest difference of numbers that count as equal; 0 in a claim of
      another direction.

  Raises:
    ValueError: `compared` is not of that form, or an address is unknown.
  """

  compared: str
  published: Sequence[str] = ()
  note: str = ''
  changes: Sequence[str] = ()
  withheld: str = ''
  column: str = dataclasses.field(init=False)
  row: str = dataclasses.field(init=False)
  than: str | float = dataclasses.field(init=False)
  direction: str = dataclasses.field(init=False)
  within: float = dataclasses.field(init=False)

  def __post_init__(self):
    match = re.fullmatch(
      r'([^:]+): (.+) (?:([<>]) (.+)|= (.+) within ([\d.]+))', self.compared
    )
    if not match:
      raise InputError(
        f"{self.compared!r} is not 'column: row < row or number', nor "
        "'column: row = row or number within number'"
      )
    column, row, sign, than, same, within = match.groups()
    than = than or same
    with contextlib.suppress(ValueError):
      than = float(than)
    values = dict(column=column, row=row, than=than)
    values['direction'] = {'<': 'lower', '>': 'higher', None: 'equal'}[sign]
    values['within'] = float(within or 0)
    for name, value in values.items():
      object.__setattr__(self, name, value)
    for address in self.published:
      claims.find(address)

  def rows(self) -> set[str]:
    """The names of the rows that are compared."""
    return {name for name in (self.row, self.than) if isinstance(name, str)}


# Claims by their text; a comparison alone is a claim with nothing beside it.
Claims = Mapping[str, str | Claim]


def stated(claims: Claims) -> dict[str, Claim]:
  """The claims by their text, also those that are a comparison alone."""
  return {
    text: Claim(claim) if isinstance(claim, str) else claim
    for text, claim in claims.items()
  }


@dataclasses.dataclass(frozen=True)
class Figure:
  """The figure of a study: panels of the rows' means with intervals.

  Attributes:
    columns: Names of the columns, each of which has a panel.
    x_label: Label of the axis of the rows' `x`; '' where rows have none.
    log_x: Whether that axis is logarithmic.
    without: Patterns of names of rows that are not drawn, such as differences;
      `*` stands for any text.
    rows: Meaning of the rows' names, which stands beside them; '' where names
      speak for themselves.
    against: Name of the column that is the x axis, on which rows are points;
      '' for none. Its axis has `x_label` and is logarithmic.
  """

  columns: Sequence[str]
  x_label: str = ''
  log_x: bool = False
  without: Sequence[str] = ()
  rows: str = ''
  against: str = ''

  def keeps(self, row: str) -> bool:
    """Whether the row of that name is drawn."""
    return not matches(row, self.without)
