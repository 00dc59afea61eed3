"""Measures a burst of interleaved steps of several runs, in a new process."""

import dataclasses
import hashlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.benchmarks import roofline, timing
from moe_jax import run_config
from moe_jax.devices import keep_freed_memory
from moe_jax.training.setup import Run, set_up

_SPAWN = multiprocessing.get_context('spawn')


@dataclasses.dataclass(frozen=True)
class Effort:
  """The size of a burst.

  Attributes:
    steps: Number of steps that are timed at once.
    seconds: Seconds after which no further round begins.
    quick: Whether the machine's peaks are those of small arrays.
  """

  steps: int = 5
  seconds: float = 30.0
  quick: bool = False


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


def fresh(function: Callable[..., Burst], *args: Any) -> Burst:
  """Calls a function of a module in a new process, and returns its result.

  Accelerators belong to this process, so that it calls the function itself.

  Raises:
    BrokenProcessPool: The process ended without a result.
  """
  if jax.default_backend() != 'cpu':
    return function(*args)
  with futures.ProcessPoolExecutor(1, _SPAWN, keep_freed_memory) as pool:
    return pool.submit(function, *args).result()


def measured(
  configs: Mapping[str, ml_collections.ConfigDict], effort: Effort
) -> Burst:
  """Measures a burst of the steps of runs, whose configs are given by name."""
  cases = {
    name: _Stepping(config, effort.steps) for name, config in configs.items()
  }
  peaks = roofline.measure_peaks(quick=effort.quick)
  for case in cases.values():  # compiles, which is no part of a burst
    case()
  begin, cpu_begin, used_begin = (
    time.perf_counter(),
    time.process_time(),
    used_seconds(),
  )
  seconds, by_round = timing.with_probes(cases, peaks, seconds=effort.seconds)
  elapsed = time.perf_counter() - begin
  other_seconds = (
    used_seconds() - used_begin - (time.process_time() - cpu_begin)
  )
  return Burst(
    {name: [s / effort.steps for s in x] for name, x in seconds.items()},
    median_peaks(by_round),
    float(np.maximum(0.0, other_seconds / elapsed)),  # keeps NaN
    timing.facts()['date'],
  )


def _set_up(config: ml_collections.ConfigDict) -> Run:
  with tempfile.TemporaryDirectory() as folder:
    return set_up(run_config.read(config), folder)


def program_digest(config: ml_collections.ConfigDict) -> str:
  """The SHA-256 of the step's program before it is compiled."""
  run = _set_up(config)
  state = run.programs.abstract_state
  program = run.train_step.lower(state, next(run.batches(0)))
  return hashlib.sha256(program.as_text().encode()).hexdigest()


class _Stepping:
  """A run of which each call takes a few more steps."""

  def __init__(self, config: ml_collections.ConfigDict, steps: int):
    self._run, self._steps = _set_up(config), steps
    self._state = self._run.programs.init_state()
    self._batches = self._run.batches(0)

  def __call__(self) -> None:
    """Takes the steps and waits for the result."""
    for _ in range(self._steps):
      self._state, _ = self._run.train_step(self._state, next(self._batches))
    jax.block_until_ready(self._state)


def median_peaks(peaks: Iterable[roofline.Peaks]) -> roofline.Peaks:
  """The peaks with the median of each speed."""
  first, *_ = peaks = list(peaks)
  return dataclasses.replace(
    first,
    flops_per_second=float(np.median([p.flops_per_second for p in peaks])),
    bytes_per_second=float(np.median([p.bytes_per_second for p in peaks])),
  )


def used_seconds() -> float:
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
