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
from collections.abc import Iterable, Iterator, Mapping, Sequence

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
from moe_jax.runs.signals import catching_interrupt

LOG = 'log.txt'
# Seconds between two lines on what is running, and between two looks at what
# has ended.
EVERY_SECONDS, _POLL_SECONDS = 60.0, 0.05


def run_all(
  runner: Runner,
  jobs: Sequence[Job],
  column: Column,
  where: Where = Where(),
  command: Sequence[str] = (),
) -> None:
  """Makes the runs that have no result yet.

  A run that fails does not stop the others. At SIGTERM or Ctrl-C no further
  run begins, and those that are being made save and stop; a second Ctrl-C ends
  this process at once, and its workers notice.

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
    # A run that is made in this process catches SIGTERM by itself.
    stack.enter_context(catching_interrupt())
    received: list[int] = []
    before = signal.signal(
      signal.SIGTERM, lambda number, _: received.append(number)
    )
    stack.callback(signal.signal, signal.SIGTERM, before)
    folder = jobs[0].workdir.parents[2] / 'submitit'
    executor, most = stack.enter_context(
      executors.opened(where, len(calls), folder)
    )
    progress, failed = _Progress(jobs, calls, column, most), []
    waiting, running, is_told = list(calls), {}, False
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
        try:
          results = running.pop(name).result()
        except (Exception, SystemExit) as error:
          if not received:  # else it may have been killed to stop
            failed.append(str(calls[name][0].workdir / LOG))
            progress.fails(name, error, command)
          continue
        if results is not None:
          for job, result in zip(calls[name], results, strict=True):
            if not job.is_finished:  # it was written to another machine's disk
              job.write_result(result)
          progress.ends(name)
      progress.tick(running)
      if running:
        time.sleep(_POLL_SECONDS)
  if failed:
    raise InputError(f'{len(failed)} runs failed; see {", ".join(failed)}')
  if not all(job.is_finished for job in missing):
    raise SystemExit(cli.STOPPED)


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


class _Progress:
  """Prints how far the calls of a study are, in whole lines, as for a log."""

  def __init__(
    self,
    jobs: Sequence[Job],
    calls: Mapping[str, Sequence[Job]],
    column: Column,
    most: int,
  ):
    self._jobs, self._calls, self._column = jobs, calls, column
    # A run that is made of another one counts as one step.
    self._steps = {
      name: sum(
        j.config.total_steps if j.arm.change is None else 1 for j in call
      )
      for name, call in calls.items()
    }
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
    call, number_of = self._calls[name], self._column.of
    arms = {job.arm.name for job in call}
    of_arm = [
      number_of(job.result())
      for job in self._jobs
      if {job.arm.name} == arms and job.is_finished
    ]
    number = np.mean([number_of(job.result()) for job in call])
    so_far = ''
    if len(of_arm) > 1:
      so_far = f' ({len(of_arm)} seeds: {Interval.of(of_arm):.4f})'
    print(
      f'[{len(self._ended)}/{len(self._calls)}] {name}: {self._column.name} '
      f'{number:.4f}{so_far}; {self._times()}',
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
    if running and time.monotonic() - self._last >= EVERY_SECONDS:
      self._last = time.monotonic()
      print(f'running: {"; ".join(running)}; {self._times()}', flush=True)

  def _times(self) -> str:
    """The minutes that have passed, and those that remain at the same speed."""
    minutes = (time.monotonic() - self._start) / 60
    if not (done := sum(self._steps[name] for name in self._ended)):
      return f'{minutes:.1f} minutes gone'
    left = minutes * (sum(self._steps.values()) - done) / done
    return f'{minutes:.1f} minutes gone, {left:.1f} left'


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
  for seen in digests.values():
    if len(seen) > 1:
      raise InputError(f'runs saw different data: sha256 {sorted(seen)}')
  return results
