"""Says how far a study is, while its runs are made.

A line stands for each call that ends, with its number, the mean of its arm so
far and the time left, and one a minute for what is running. All are whole
lines, so that a log file reads as a terminal does.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiments.study import workers
from experiments.study.jobs import Job
from experiments.study.parts import Column
from experiments.study.scheduler import FAILED
from experiments.study.tables import Interval
from moe_jax.runs import metrics

EVERY_SECONDS = 60.0


class Progress:
  """Prints how far the calls of a study are."""

  def __init__(
    self,
    calls: Mapping[str, Sequence[Job]],
    column: Column,
    num_workers: int,
    jobs: Sequence[Job],
  ):
    """Prints a line on the calls, steps, seeds and arms that are missing.

    Args:
      calls: The runs of each call, by its name.
      column: Column whose number is printed when a call ends.
      num_workers: Number of calls at a time.
      jobs: All runs of the study, those that are finished among them.
    """
    self._calls, self._column, self._jobs = calls, column, jobs
    self._total = sum(map(_total_steps, calls.values()))
    self._ended: list[str] = []
    self._running: dict[str, float] = {}
    self._start = time.perf_counter()
    # A run that is made in this process has its own standard output.
    self._output = sys.stdout
    missing_jobs = [job for call_jobs in calls.values() for job in call_jobs]
    arms = dict.fromkeys(job.arm.name for job in missing_jobs)
    seeds = dict.fromkeys(str(job.seed) for job in missing_jobs)
    self._print(
      f'{num_workers} at a time, {self._total:,} steps; seeds '
      f'{", ".join(seeds)} of the arms {"; ".join(arms)}'
    )

  def begins(self, name: str) -> None:
    """Notes a call that begins; see `scheduler.run_all`."""
    self._running[name] = time.perf_counter()

  def ends(self, name: str, outcome: str, call: workers.Call) -> None:
    """Prints the outcome of a call; see `scheduler.run_all`."""
    jobs = self._calls[name]
    self._running.pop(name, None)
    self._ended.append(name)
    if outcome == FAILED:
      self._print(f'{name}: {outcome}\n{call.error}')
    elif not all(job.is_finished for job in jobs):
      self._print(f'{name}: {outcome}')
    else:
      value = np.mean([self._column.of(job.result()) for job in jobs])
      self._print(
        f'[{len(self._ended)}/{len(self._calls)}] {name}: {self._column.name} '
        f'{value:.4f}{self._so_far(jobs)}; {self._times()}'
      )

  @contextlib.contextmanager
  def ticking(self) -> Iterator[None]:
    """Prints a line on the running calls from time to time."""
    stop = threading.Event()

    def tick():
      while not stop.wait(EVERY_SECONDS):
        self.tick()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
      yield
    finally:
      stop.set()
      thread.join()

  def tick(self) -> None:
    """Prints a line on the running calls."""
    if running := list(self._running):
      calls_text = '; '.join(
        f'{name} {self._how_far(name)}' for name in running
      )
      self._print(f'running: {calls_text}; {self._times()}')

  def _print(self, text: str) -> None:
    print(text, file=self._output, flush=True)

  def _how_far(self, name: str) -> str:
    """The step and the loss of a running call, or its age before the first."""
    rows = _last_rows(self._calls[name])
    if not rows:
      age = time.perf_counter() - self._running.get(name, self._start)
      return f'began {age / 60:.1f} minutes ago'
    loss = rows[-1].get('train/loss')
    loss_text = f', loss {loss:.4f}' if isinstance(loss, float) else ''
    step, total = (
      _logged_steps(self._calls[name]),
      _total_steps(self._calls[name]),
    )
    return f'at step {step:,} of {total:,}{loss_text}'

  def _so_far(self, jobs: Sequence[Job]) -> str:
    """The mean of an arm over its finished seeds, from the second one on."""
    arms = {job.arm.name for job in jobs}
    if len(arms) > 1:
      return ''
    numbers = [
      self._column.of(job.result())
      for job in self._jobs
      if job.arm.name in arms and job.is_finished
    ]
    if len(numbers) < 2:
      return ''
    return f' ({len(numbers)} seeds: {Interval.of(numbers):.4f})'

  def _times(self) -> str:
    """The minutes that have passed, and those that remain at the same speed."""
    elapsed = time.perf_counter() - self._start
    done_steps = sum(_total_steps(self._calls[name]) for name in self._ended)
    done_steps += sum(
      _logged_steps(self._calls[name]) for name in list(self._running)
    )
    # The first steps wait for the compiler, and would tell of hours.
    if done_steps < 0.02 * self._total or not done_steps:
      return f'{elapsed / 60:.1f} minutes gone'
    remaining = elapsed * max(self._total - done_steps, 0) / done_steps
    return f'{elapsed / 60:.1f} minutes gone, {remaining / 60:.1f} left'


def _last_rows(jobs: Sequence[Job]) -> list[metrics.Row]:
  """The last row of each run's metrics, if it has one."""
  last = []
  for job in jobs:
    with contextlib.suppress(OSError, ValueError):  # not there, or half a row
      last += metrics.read_metrics(job.workdir / metrics.FILE_NAME)[-1:]
  return last


def _logged_steps(jobs: Sequence[Job]) -> int:
  """The steps that a running call has logged."""
  return min(sum(row['step'] for row in _last_rows(jobs)), _total_steps(jobs))


def _total_steps(jobs: Sequence[Job]) -> int:
  """The steps of training; a run that is made of another one counts as one."""
  return sum(
    1 if job.arm.change is not None else job.config.total_steps for job in jobs
  )
