"""Times the steps of a study's arms, interleaved, after its runs.

Steps are timed in bursts, each in a process of its own, so that what differs
between processes is in the intervals, too. Bursts are kept one by one. For one
in which other processes used the machine another is measured at once, up to
three times as many as are needed, of which the least disturbed are taken; if
these are still of a busy machine the table says so, until their file is
deleted.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from experiments.benchmarks import roofline, timing
from experiments.study import step_bursts, submit
from experiments.study.jobs import Job
from experiments.study.step_bursts import Burst
from moe_jax.runs import workdir as workdir_lib

_LOOK_SECONDS = 1.0
# Largest number of bursts that are measured for one that is not disturbed.
_MOST = 3
# Share of the cores that others may use on a machine that counts as idle.
_IDLE = 0.05
_EFFORT = step_bursts.Effort()


class StepTime(float):
  """An arm's step time as a ratio to that of the first arm of its group.

  As a number it is the median over all rounds.

  Attributes:
    spread: Quartiles of the ratio over all rounds.
    ratios: Median ratio of each burst.
    seconds: Median seconds of a step of each burst.
    peaks: Peaks of the machine, medians over all rounds.
    others: Largest number of cores that other processes used during a burst;
      NaN where the system does not say.
    dates: Days of the bursts, in UTC, ascending.
  """

  spread: timing.Spread
  ratios: tuple[float, ...]
  seconds: tuple[float, ...]
  peaks: roofline.Peaks
  others: float
  dates: tuple[str, ...]

  @classmethod
  def of(cls, name: str, first: str, bursts: Sequence[Burst]) -> 'StepTime':
    """The step time of one arm in some bursts.

    Args:
      name: Name of the arm.
      first: Name of the arm to whose time ratios are taken, round by round.
      bursts: The bursts, in each of which both arms were timed.
    """
    rounds = [
      [a / b for a, b in zip(x.seconds[name], x.seconds[first], strict=True)]
      for x in bursts
    ]
    spread = timing.Spread.of([x for ratios in rounds for x in ratios])
    step_time = cls(spread.median)
    step_time.spread = spread
    step_time.ratios = tuple(float(np.median(ratios)) for ratios in rounds)
    step_time.seconds = tuple(float(np.median(x.seconds[name])) for x in bursts)
    step_time.peaks = step_bursts.median_peaks(x.peaks for x in bursts)
    step_time.others = max(x.others for x in bursts)
    step_time.dates = tuple(sorted({x.date[:10] for x in bursts}))
    return step_time


def step_times(
  groups: Sequence[Sequence[str]],
  jobs: Sequence[Job],
  output: pathlib.Path,
  bursts: int = 1,
) -> dict[str, StepTime]:
  """Step times of the arms of each group, by name of the arm.

  The steps of a group are interleaved in a process that has all cores, and
  ratios to its first arm are taken within rounds. Bursts are measured once for
  a device and the programs of the steps, so again where the code has changed
  these, and read from a file later; the least disturbed ones are taken.

  Args:
    groups: Names of the arms to be timed together, each in one group. Those
      that have no run are skipped.
    jobs: Runs of the study, which have the configs of its arms.
    output: Folder of the study.
    bursts: Number of bursts of each group.
  """
  first = {job.arm.name: job for job in reversed(jobs)}
  by_name = {}
  for group in groups:
    timed = {name: first[name] for name in group if name in first}
    if timed:
      group_bursts = _bursts(timed, output, bursts)
      base = next(iter(timed))
      by_name |= {name: StepTime.of(name, base, group_bursts) for name in timed}
  return by_name


def describe(times: Mapping[str, StepTime]) -> str:
  """A sentence on how many bursts there were, and how busy the machine was."""
  numbers = sorted({len(t.ratios) for t in times.values()})
  other_cores = max(t.others for t in times.values())
  dates = sorted({date for t in times.values() for date in t.dates})
  cores_text = (
    'an unknown number'
    if np.isnan(other_cores)
    else f'at most {other_cores:.2f}'
  )
  sentence = (
    f'They were measured in {" or ".join(map(str, numbers))} '
    f'burst{"s" * (numbers[-1] > 1)} on {" and ".join(dates)}, in which other '
    f'processes used {cores_text} of {os.cpu_count()} cores'
  )
  busy = [name for name, t in times.items() if _is_busy(t.others)]
  if busy:
    sentence += ': the machine was BUSY'
    sentence += f' for {"; ".join(busy)}' * (len(busy) < len(times))
  return f'{sentence}.'


def _bursts(
  timed: Mapping[str, Job], output: pathlib.Path, number: int
) -> list[Burst]:
  """The least disturbed bursts; those that are missing are measured.

  No run of the study is made meanwhile.
  """
  configs = {name: job.config for name, job in timed.items()}
  programs = [step_bursts.program_digest(config) for config in configs.values()]
  # The file has the names of arms, which equal programs do not tell apart.
  machine = [timing.device_name(), str(os.cpu_count()), jax.__version__]
  key = ' '.join([*machine, *configs, *programs])
  name = hashlib.sha256(key.encode()).hexdigest()[:10]
  path = output / f'step_bursts-{name}.json'
  with submit.alone(output):
    bursts = []
    if path.exists():
      bursts = [Burst.read(x) for x in json.loads(path.read_text('utf-8'))]
    if _needs_burst(bursts, number):
      print(f'timing the steps of {len(timed)} arms{_warning()}', flush=True)
    while _needs_burst(bursts, number):
      bursts.append(step_bursts.fresh(step_bursts.measured, configs, _EFFORT))
      text = json.dumps(
        [dataclasses.asdict(burst) for burst in bursts], indent=1
      )
      workdir_lib.write_text(path, text + '\n')
  return sorted(bursts, key=lambda burst: burst.others)[:number]


def _needs_burst(bursts: Sequence[Burst], number: int) -> bool:
  """Whether another burst is measured."""
  num_undisturbed = sum(not _is_busy(burst.others) for burst in bursts)
  return num_undisturbed < number and len(bursts) < _MOST * number


def _is_busy(other_cores: float) -> bool:
  """Whether other processes use so many cores that steps are disturbed."""
  return other_cores > _IDLE * (os.cpu_count() or 1)


def _warning() -> str:
  """Words on a machine that other processes are using now, if they are."""
  begin, used_before = time.perf_counter(), step_bursts.used_seconds()
  time.sleep(_LOOK_SECONDS)
  other_cores = (step_bursts.used_seconds() - used_before) / (
    time.perf_counter() - begin
  )
  if not _is_busy(other_cores):
    return ''
  return (
    f'; WARNING: other processes use {other_cores:.1f} of {os.cpu_count()} '
    'cores, which the table will say if it goes on'
  )
