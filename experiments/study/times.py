"""Times the steps of a study's arms, interleaved, after its runs.

Steps are timed in bursts, which are kept one by one. For a burst in which other
processes used the machine another is measured at once, up to three times as
many as are needed, of which the least disturbed are taken; if these are still
of a busy machine the table says so, until their file is deleted. Not here: the
runs (`scheduled_runs.py`).
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.benchmarks import timing
from experiments.study import scheduled_runs
from experiments.study.jobs import Job
from moe_jax import run_config
from moe_jax.analysis import roofline
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.setup import set_up
from moe_jax.training.step import TrainState

_STEPS = 5
_SECONDS = 30.0
_LOOK_SECONDS = 1.0
# Largest number of bursts that are measured for one that is not disturbed.
_MOST = 3
# Share of the cores that others may use on a machine that counts as idle.
_IDLE = 0.05


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
  def of(cls, name: str, first: str, bursts: Sequence['Burst']) -> 'StepTime':
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
    step_time.peaks = _median(x.peaks for x in bursts)
    step_time.others = max(x.others for x in bursts)
    step_time.dates = tuple(sorted({x.date[:10] for x in bursts}))
    return step_time


@dataclasses.dataclass(frozen=True)
class Burst:
  """Interleaved rounds that were timed without a break.

  Attributes:
    seconds: Seconds of a step in each round, by name of the arm.
    peaks: Peaks of the machine, medians over the rounds.
    others: Number of cores that other processes used, on average; NaN where
      the system does not say.
    date: Date and time of the burst, in UTC.
  """

  seconds: Mapping[str, Sequence[float]]
  peaks: roofline.Peaks
  others: float
  date: str

  @classmethod
  def read(cls, values: Mapping[str, Any]) -> 'Burst':
    """The burst that `dataclasses.asdict` turned into values."""
    return cls(**{**values, 'peaks': roofline.Peaks(**values['peaks'])})


def step_times(
  groups: Sequence[Sequence[str]],
  jobs: Sequence[Job],
  output: pathlib.Path,
  bursts: int = 1,
) -> dict[str, StepTime]:
  """Step times of the arms of each group, by name of the arm.

  The steps of a group are interleaved in one process that has all cores, and
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
      taken = _bursts(timed, output, bursts)
      base = next(iter(timed))
      by_name |= {name: StepTime.of(name, base, taken) for name in timed}
  return by_name


def describe(times: Mapping[str, StepTime]) -> str:
  """A sentence on how many bursts there were, and how busy the machine was."""
  numbers = sorted({len(t.ratios) for t in times.values()})
  others = max(t.others for t in times.values())
  dates = sorted({date for t in times.values() for date in t.dates})
  used = 'an unknown number' if np.isnan(others) else f'at most {others:.2f}'
  said = (
    f'They are of {" or ".join(map(str, numbers))} '
    f'burst{"s" * (numbers[-1] > 1)} on {" and ".join(dates)}, in which other '
    f'processes used {used} of {os.cpu_count()} cores'
  )
  busy = [name for name, t in times.items() if _is_busy(t.others)]
  if busy:
    said += ': the machine was BUSY'
    said += f' for {"; ".join(busy)}' * (len(busy) < len(times))
  return f'{said}.'


def _bursts(
  timed: Mapping[str, Job], output: pathlib.Path, number: int
) -> list[Burst]:
  """The least disturbed bursts; those that are missing are measured.

  No run of the study is made meanwhile.
  """
  cases = {name: _Stepping(job.config) for name, job in timed.items()}
  programs = [case.digest() for case in cases.values()]
  # The file has the names of arms, which equal programs do not tell apart.
  machine = [timing.device_name(), str(os.cpu_count()), jax.__version__]
  key = ' '.join([*machine, *cases, *programs])
  name = hashlib.sha256(key.encode()).hexdigest()[:10]
  path = output / f'step_bursts-{name}.json'
  with scheduled_runs.alone(output):
    kept = []
    if path.exists():
      kept = [Burst.read(x) for x in json.loads(path.read_text('utf-8'))]
    measure = None
    while _missing(kept, number):
      if measure is None:
        print(f'timing the steps of {len(timed)} arms{_warning()}', flush=True)
        measure = _Measuring(cases)
      kept.append(measure())
      text = json.dumps([dataclasses.asdict(burst) for burst in kept], indent=1)
      workdir_lib.write_text(path, text + '\n')
  return sorted(kept, key=lambda burst: burst.others)[:number]


def _missing(kept: Sequence[Burst], number: int) -> bool:
  """Whether another burst is measured."""
  good = sum(not _is_busy(burst.others) for burst in kept)
  return good < number and len(kept) < _MOST * number


def _is_busy(others: float) -> bool:
  """Whether other processes use so many cores that steps are disturbed."""
  return others > _IDLE * (os.cpu_count() or 1)


def _warning() -> str:
  """Words on a machine that other processes are using now, if they are."""
  begin, used = time.perf_counter(), _used()
  time.sleep(_LOOK_SECONDS)
  others = (_used() - used) / (time.perf_counter() - begin)
  if not _is_busy(others):
    return ''
  return (
    f'; WARNING: other processes use {others:.1f} of {os.cpu_count()} cores, '
    'which the table will say if it goes on'
  )


class _Measuring:
  """Measures bursts of steps, each of which is compiled once."""

  def __init__(self, cases: Mapping[str, '_Stepping']):
    self._cases, self._peaks = cases, roofline.measure_peaks()
    for case in cases.values():  # compiles, which is no part of a burst
      case()

  def __call__(self) -> Burst:
    """Measures one burst."""
    begin, own, used = time.perf_counter(), time.process_time(), _used()
    seconds, peaks = timing.with_probes(
      self._cases, self._peaks, seconds=_SECONDS
    )
    elapsed = time.perf_counter() - begin
    others = _used() - used - (time.process_time() - own)
    return Burst(
      {name: [s / _STEPS for s in rounds] for name, rounds in seconds.items()},
      _median(peaks),
      float(np.maximum(0.0, others / elapsed)),  # keeps NaN
      timing.facts()['date'],
    )


class _Stepping:
  """A run of which each call takes a few more steps."""

  def __init__(self, config: ml_collections.ConfigDict):
    with tempfile.TemporaryDirectory() as folder:
      self._run = set_up(run_config.read(config), folder)
    self._state: TrainState | None = None
    self._batches = self._run.batches(0)

  def digest(self) -> str:
    """The SHA-256 of the step's program before it is compiled."""
    state = self._run.programs.abstract_state
    program = self._run.train_step.lower(state, next(self._batches))
    return hashlib.sha256(program.as_text().encode()).hexdigest()

  def __call__(self) -> None:
    """Takes the steps and waits for the result."""
    if self._state is None:
      self._state = self._run.programs.init_state()
    for _ in range(_STEPS):
      self._state, _ = self._run.train_step(self._state, next(self._batches))
    jax.block_until_ready(self._state)


def _median(peaks: Iterable[roofline.Peaks]) -> roofline.Peaks:
  """The peaks with the median of each speed."""
  first, *_ = peaks = list(peaks)
  return dataclasses.replace(
    first,
    flops_per_second=float(np.median([p.flops_per_second for p in peaks])),
    bytes_per_second=float(np.median([p.bytes_per_second for p in peaks])),
  )


def _used() -> float:
  """Seconds for which all processes have used the cores of this machine.

  It is NaN where the system does not say.
  """
  try:
    with open('/proc/stat', encoding='utf-8') as file:
      ticks = [int(n) for n in file.readline().split()[1:9]]
  except OSError:
    return float('nan')
  # The fourth and fifth are those of idle cores.
  return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf('SC_CLK_TCK')
