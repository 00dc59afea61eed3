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
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.benchmarks import roofline, timing
from experiments.study import submit
from experiments.study.jobs import Job
from moe_jax import run_config
from moe_jax.devices import keep_freed_memory
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.setup import Run, set_up

# Largest number of bursts that are measured for one that is not disturbed.
_MOST = 3
# Share of the cores that others may use on a machine that counts as idle.
_IDLE = 0.05
# Arguments of `measured`.
_EFFORT: dict[str, Any] = {'steps': 5, 'seconds': 30.0}
_SPAWN = multiprocessing.get_context('spawn')


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
    step_time.peaks = _median_peaks(x.peaks for x in bursts)
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
  unknown, known = 'an unknown number', f'at most {other_cores:.2f}'
  cores_text = unknown if np.isnan(other_cores) else known
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
  programs = [program_digest(config) for config in configs.values()]
  # The file has the names of arms, which equal programs do not tell apart.
  machine = [timing.device_name(), str(os.cpu_count()), jax.__version__]
  key = ' '.join([*machine, *configs, *programs])
  name = hashlib.sha256(key.encode()).hexdigest()[:10]
  path = output / f'step_bursts-{name}.json'
  with submit.alone(output):
    bursts = []
    if path.exists():
      bursts = [Burst.read(x) for x in json.loads(path.read_text('utf-8'))]
    while (
      sum(not _is_busy(burst.others) for burst in bursts) < number
      and len(bursts) < _MOST * number
    ):
      print(f'timing the steps of {len(timed)} arms', flush=True)
      bursts.append(_fresh(configs))
      values = [dataclasses.asdict(burst) for burst in bursts]
      workdir_lib.write_text(path, json.dumps(values, indent=1) + '\n')
  return sorted(bursts, key=lambda burst: burst.others)[:number]


def _is_busy(other_cores: float) -> bool:
  """Whether other processes use so many cores that steps are disturbed."""
  return other_cores > _IDLE * (os.cpu_count() or 1)


def _fresh(configs: Mapping[str, ConfigDict]) -> Burst:
  """Measures a burst in a new process.

  Accelerators belong to this process, so that it measures their steps itself.

  Raises:
    BrokenProcessPool: The process ended without a result.
  """
  if jax.default_backend() != 'cpu':
    return measured(configs, **_EFFORT)
  with futures.ProcessPoolExecutor(1, _SPAWN, keep_freed_memory) as pool:
    return pool.submit(measured, configs, **_EFFORT).result()


def measured(
  configs: Mapping[str, ConfigDict],
  steps: int,
  seconds: float,
  quick: bool = False,
) -> Burst:
  """Measures a burst of the steps of runs.

  Args:
    configs: Configs of the runs, by name.
    steps: Number of steps that are timed at once.
    seconds: Seconds after which no further round begins.
    quick: Whether the machine's peaks are those of small arrays.
  """
  cases = {name: _stepping(config, steps) for name, config in configs.items()}
  peaks = roofline.measure_peaks(quick=quick)
  for case in cases.values():  # compiles, which is no part of a burst
    case()
  clocks = time.perf_counter, time.process_time, _used_seconds
  begin = [clock() for clock in clocks]
  by_case, by_round = timing.with_probes(cases, peaks, seconds=seconds)
  elapsed, own, used = (c() - b for c, b in zip(clocks, begin, strict=True))
  return Burst(
    {name: [x / steps for x in rounds] for name, rounds in by_case.items()},
    _median_peaks(by_round),
    float(np.maximum(0.0, (used - own) / elapsed)),  # keeps NaN
    timing.facts()['date'],
  )


def _set_up(config: ConfigDict) -> Run:
  with tempfile.TemporaryDirectory() as folder:
    return set_up(run_config.read(config), folder)


def program_digest(config: ConfigDict) -> str:
  """The SHA-256 of the step's program before it is compiled."""
  run = _set_up(config)
  state = run.programs.abstract_state
  program = run.train_step.lower(state, next(run.batches(0)))
  return hashlib.sha256(program.as_text().encode()).hexdigest()


def _stepping(config: ConfigDict, steps: int) -> Callable[[], None]:
  """A function that takes a few more steps of a run, and waits for them."""
  run = _set_up(config)
  state, batches = run.programs.init_state(), run.batches(0)

  def take() -> None:
    nonlocal state
    for _ in range(steps):
      state, _ = run.train_step(state, next(batches))
    jax.block_until_ready(state)

  return take


def _median_peaks(peaks: Iterable[roofline.Peaks]) -> roofline.Peaks:
  """The peaks with the median of each speed."""
  first, *_ = peaks = list(peaks)
  return dataclasses.replace(
    first,
    flops_per_second=float(np.median([p.flops_per_second for p in peaks])),
    bytes_per_second=float(np.median([p.bytes_per_second for p in peaks])),
  )


def _used_seconds() -> float:
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
