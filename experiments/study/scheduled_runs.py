"""Makes the runs of a study that are missing, and reads all of them.

A finished run is read, one that was killed starts again, and one that was
stopped by SIGTERM continues.
"""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator, Sequence

from experiments.study import scheduler, workers
from experiments.study.jobs import Job
from experiments.study.parts import Column, Results
from experiments.study.run_progress import Progress
from experiments.study.runner import Runner
from experiments.study.scheduler import FAILED, STOPPED, WAITING
from moe_jax import cli
from moe_jax.devices import forget_programs
from moe_jax.errors import InputError

LOG = 'log.txt'


def run_all(
  runner: Runner, jobs: Sequence[Job], column: Column, num_workers: int = 0
) -> None:
  """Makes the runs that have no result yet.

  Args:
    runner: Object that makes the runs.
    jobs: All runs of the study.
    column: Column whose number is printed when a run ends.
    num_workers: Number of runs at a time; 0 takes one for each core of a CPU,
      or one on accelerators. With 1 runs are made in this process.

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
    count = min(num_workers or workers.usual(), len(calls))
    runner.prepare(missing)
    progress = Progress(calls, column, count, jobs)
    with workers.places(count) as places, progress.ticking():
      tasks = {
        name: lambda worker, call=call: worker.call(_logged, runner, call)
        for name, call in calls.items()
      }
      outcomes = scheduler.run_all(
        tasks, places, begins=progress.begins, ends=progress.ends
      )
  failed = [name for name, outcome in outcomes.items() if outcome == FAILED]
  if failed:
    logs = [str(calls[name][0].workdir / LOG) for name in failed]
    raise InputError(f'{len(failed)} runs failed; see {", ".join(logs)}')
  if {STOPPED, WAITING} & set(outcomes.values()):
    raise SystemExit(cli.STOPPED)


def _logged(runner: Runner, jobs: list[Job]) -> None:
  """Makes the runs of one call; output goes to the first run's log."""
  workdir = jobs[0].workdir
  workdir.mkdir(parents=True, exist_ok=True)
  forget_programs()
  with (
    (workdir / LOG).open('a', encoding='utf-8') as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    runner(jobs)


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
