"""Submits the runs of a study that are missing, and reads all of them.

Runs are independent calls of a function, each of which writes its results to
folders of its own. A finished run is skipped, one that was killed starts again,
and one that was stopped by SIGTERM continues.
"""

import contextlib
import fcntl
import json
import multiprocessing
import pathlib
import shlex
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study import executors
from experiments.study.executors import Where
from experiments.study.jobs import Job
from experiments.study.parts import Column, Result, Results
from experiments.study.runner import Runner
from moe_jax import cli
from moe_jax.analysis.intervals import Interval
from moe_jax.devices import forget_programs, keep_freed_memory
from moe_jax.errors import InputError

LOG = 'log.txt'
# Seconds between two lines on what is running, and between two looks at what
# has ended.
EVERY_SECONDS, _POLL_SECONDS = 60.0, 0.05
_Calls = Mapping[str, Sequence[Job]]


def run_all(
  runner: Runner,
  jobs: Sequence[Job],
  column: Column,
  where: Where = Where(),
  command: Sequence[str] = (),
) -> None:
  """Makes the runs that have no result yet.

  A run that fails does not stop the others. At SIGTERM or Ctrl-C no further
  run begins, and those that are being made save and stop; a second signal ends
  this process at once.

  Args:
    runner: Object that makes the runs.
    jobs: All runs of the study.
    column: Column whose number is printed when a run ends.
    where: Where runs are made.
    command: Words of the command whose flag `--only` makes one run.

  Raises:
    SystemExit: SIGTERM or Ctrl-C stopped the runs; the same call continues
      them.
    ValueError: Some runs failed.
  """
  with contextlib.ExitStack() as stack:
    if not all(job.is_finished for job in jobs):
      stack.enter_context(alone(jobs[0].workdir.parents[2]))
    missing = [job for job in jobs if not job.is_finished]
    num_finished = len(jobs) - len(missing)
    print(f'{len(jobs)} runs, {num_finished} of them there', flush=True)
    if not missing:
      return
    calls: dict[str, list[Job]] = {}
    for job in missing:
      calls.setdefault(runner.together(job), []).append(job)
    runner.prepare(missing)
    received = stack.enter_context(_signals())
    folder = jobs[0].workdir.parents[2] / 'submitit'
    executor, most = stack.enter_context(
      executors.opened(where, len(calls), folder)
    )
    progress, failed = _Progress(jobs, calls, column, most), []
    ended = _as_they_end(executor, most, runner, calls, received, progress.tick)
    for name, call in ended:
      try:
        results = call.result()
      except (Exception, SystemExit) as error:
        if not received:  # else it may have been killed to stop
          failed.append(name)
          progress.fails(name, error, command)
        continue
      if results is not None:
        for job, result in zip(calls[name], results, strict=True):
          if not job.is_finished:  # it was written to another machine's disk
            job.write_result(result)
        progress.ends(name)
  if failed:
    logs = [str(calls[name][0].workdir / LOG) for name in failed]
    raise InputError(f'{len(failed)} runs failed; see {", ".join(logs)}')
  if not all(job.is_finished for job in missing):
    raise SystemExit(cli.STOPPED)


def _as_they_end(
  executor: Any,
  most: int,
  runner: Runner,
  calls: _Calls,
  received: Sequence[int],
  tick: Callable[[Iterable[str]], None],
) -> Iterator[tuple[str, Any]]:
  """Submits calls, and yields the name of each that ends, and its future.

  Args:
    executor: What calls are submitted to.
    most: Number of calls at a time.
    runner: Object that makes the runs.
    calls: The runs of each call, by name.
    received: Numbers of signals; from the first one on no call is submitted,
      and those that run are told to stop.
    tick: Function that is called with the names of running calls.
  """
  waiting, is_told = list(calls), False
  running: dict[str, Any] = {}
  while running or (waiting and not received):
    while waiting and len(running) < most and not received:
      name = waiting.pop(0)
      running[name] = executor.submit(make, runner, calls[name])
    if received and not is_told:
      is_told = True
      print('stopping: runs save, and the same command goes on', flush=True)
      for process in multiprocessing.active_children():
        process.terminate()
      for call in running.values():
        call.cancel()
    for name in [name for name, call in running.items() if call.done()]:
      yield name, running.pop(name)
    tick(running)
    if running:
      time.sleep(_POLL_SECONDS)


def make(runner: Runner, jobs: Sequence[Job]) -> list[Result] | None:
  """Makes the runs of one call; output goes to the first run's log.

  Returns:
    The results, or None where SIGTERM stopped a run: the same call goes on.
  """
  workdir = jobs[0].workdir
  workdir.mkdir(parents=True, exist_ok=True)
  keep_freed_memory()
  forget_programs()
  with (
    (workdir / LOG).open('a', encoding='utf-8') as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    try:
      runner(jobs)
    except SystemExit as error:
      if error.code != cli.STOPPED:
        raise
      return None
  return [job.result() for job in jobs]


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Catches the first SIGINT or SIGTERM; yields the list of those received.

  A run that is made in this process catches SIGTERM by itself, so Ctrl-C is
  turned into one. A second signal has the system's effect: workers notice that
  this process has ended.
  """
  received: list[int] = []
  caught = signal.SIGINT, signal.SIGTERM

  def stop(number, _):
    received.append(number)
    for number in caught:
      signal.signal(number, signal.SIG_DFL)

  def interrupt(*_):
    signal.raise_signal(signal.SIGTERM)

  before = [
    signal.signal(number, handler)
    for number, handler in zip(caught, (interrupt, stop), strict=True)
  ]
  try:
    yield received
  finally:
    for number, handler in zip(caught, before, strict=True):
      signal.signal(number, handler)


class _Progress:
  """Prints how far the calls of a study are, in whole lines, as for a log."""

  def __init__(
    self, jobs: Sequence[Job], calls: _Calls, column: Column, most: int
  ):
    self._jobs, self._calls, self._column = jobs, calls, column
    self._steps = {name: _total_steps(call) for name, call in calls.items()}
    self._ended: list[str] = []
    self._start = self._last = time.monotonic()
    missing = [job for call in calls.values() for job in call]
    arms = dict.fromkeys(job.arm.name for job in missing)
    seeds = dict.fromkeys(str(job.seed) for job in missing)
    print(
      f'{most} at a time, {sum(self._steps.values()):,} steps; seeds '
      f'{", ".join(seeds)} of the arms {"; ".join(arms)}',
      flush=True,
    )

  def ends(self, name: str) -> None:
    """Prints the number of a call that ended, and the mean of its arm."""
    self._ended.append(name)
    arms = {job.arm.name for job in self._calls[name]}
    numbers = [self._column.of(job.result()) for job in self._calls[name]]
    of_arm = [
      self._column.of(job.result())
      for job in self._jobs
      if {job.arm.name} == arms and job.is_finished
    ]
    so_far = ''
    if len(of_arm) > 1:
      so_far = f' ({len(of_arm)} seeds: {Interval.of(of_arm):.4f})'
    print(
      f'[{len(self._ended)}/{len(self._calls)}] {name}: {self._column.name} '
      f'{np.mean(numbers):.4f}{so_far}; {self._times()}',
      flush=True,
    )

  def fails(
    self, name: str, error: BaseException, command: Sequence[str]
  ) -> None:
    """Prints the error of a call, and commands that make its runs alone."""
    self._ended.append(name)
    print(f'{name}: failed\n{"".join(traceback.format_exception(error))}')
    for job in self._calls[name]:
      again = shlex.join([*command, f'--only={job.name}'])
      print(f'this run alone: {again}', flush=True)

  def tick(self, running: Iterable[str]) -> None:
    """Prints a line on the running calls, if it is time for one."""
    if not running or time.monotonic() - self._last < EVERY_SECONDS:
      return
    self._last = time.monotonic()
    print(f'running: {"; ".join(running)}; {self._times()}', flush=True)

  def _times(self) -> str:
    """The minutes that have passed, and those that remain at the same speed."""
    minutes = (time.monotonic() - self._start) / 60
    done = sum(self._steps[name] for name in self._ended)
    if not done:
      return f'{minutes:.1f} minutes gone'
    left = minutes * (sum(self._steps.values()) - done) / done
    return f'{minutes:.1f} minutes gone, {left:.1f} left'


def _total_steps(jobs: Sequence[Job]) -> int:
  """The steps of training; a run that is made of another one counts as one."""
  return sum(
    1 if job.arm.change is not None else job.config.total_steps for job in jobs
  )


@contextlib.contextmanager
def alone(output: pathlib.Path) -> Iterator[None]:
  """Locks the study's folder; waits where another process has locked it."""
  output.mkdir(parents=True, exist_ok=True)
  with (output / 'lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      print(f'waits for another process that runs in {output}', flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def read_all(jobs: Sequence[Job]) -> Results:
  """Reads the results of finished runs, by arm, one for each seed.

  Raises:
    ValueError: Two runs with the same data options saw different data.
  """
  results: dict[str, list] = {}
  digests: dict[str, set[str]] = {}
  for job in jobs:
    result = job.result()
    results.setdefault(job.arm.name, []).append(result)
    source = json.dumps(job.config.data.to_dict(), default=list)
    digests.setdefault(source, set()).add(result['data_digest'])
  for data_digests in digests.values():
    if len(data_digests) > 1:
      raise InputError(
        f'runs saw different data: sha256 {sorted(data_digests)}'
      )
  return results
