"""Runs whose parameters other runs of a study begin with, or learn from.

A start is trained once for each seed, or made of another start, and keeps its
last checkpoint in the folder `starts` beside the studies' own, so that studies
which begin with equal runs share them.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.study.jobs import Job, jobs_of
from experiments.study.parts import Arm, Change
from moe_jax.config import Options, unknown
from moe_jax.errors import InputError

FOLDER = 'starts'
# The runs of starts, by the name of the start and the seed.
Started = Mapping[tuple[str, int], Job]


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
  """

  name: str
  config: Callable[[ConfigDict], ConfigDict] | None = None
  start: str = ''
  change: Change | None = None
  teacher: str = ''
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def arm(self) -> Arm:
    """The arm whose runs are those of the start."""
    before = {'start': self.start, 'teacher': self.teacher}
    return Arm(self.name, self.overrides, change=self.change, **before)


def in_order(starts: Sequence[Start], arms: Sequence[Arm]) -> list[list[Start]]:
  """The starts that arms need; a list begins with or learns from earlier ones.

  Raises:
    ValueError: There is no start of a name, or starts begin with each other.
  """
  by_name = {start.name: start for start in starts}
  levels: dict[str, int] = {}

  def level(name: str, above: tuple[str, ...] = ()) -> int:
    """The number of starts that come before one; notes it for all of them."""
    if name not in by_name:
      raise unknown('start', name, by_name)
    if name in above:
      raise InputError(f'starts begin with each other: {[*above, name]}')
    before = by_name[name].arm.runs_before.values()
    numbers = [level(other, (*above, name)) for other in before]
    levels[name] = 1 + max(numbers, default=-1)
    return levels[name]

  for arm in arms:
    for name in arm.runs_before.values():
      level(name)
  return [
    [by_name[name] for name, depth in levels.items() if depth == number]
    for number in range(max(levels.values(), default=-1) + 1)
  ]


def start_jobs(
  cls: type[Options],
  shared: ConfigDict,
  levels: Sequence[Sequence[Start]],
  seeds: Sequence[int],
  results: pathlib.Path,
) -> list[list[Job]]:
  """The runs of starts on all seeds, in the lists that `in_order` returns.

  Args:
    cls: Class of the options that configs describe.
    shared: The config that all arms share.
    levels: The starts; those of a list begin with or learn from those of
      earlier lists.
    seeds: The seeds.
    results: Folder of all studies' results.
  """
  jobs: list[list[Job]] = []
  for level in levels:
    before, level_jobs = started(jobs), []
    for start in level:
      config = start.config(shared) if start.config else shared
      folder = results / FOLDER
      level_jobs += jobs_of(cls, config, [start.arm], seeds, folder, before)
    jobs.append([dataclasses.replace(job, keeps=True) for job in level_jobs])
  return jobs


def started(levels: Sequence[Sequence[Job]]) -> Started:
  """The runs of all lists, by the name of the start and the seed."""
  return {(job.arm.name, job.seed): job for level in levels for job in level}
