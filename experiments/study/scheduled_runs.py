"""A study's runs: one process a core, kept by the hash of their config.

A run that is finished is read, one that was killed begins anew (what SIGTERM
stopped goes on), and runs that differ in loss weights and seeds alone share a
compiled step. Not here: what a study asks (`study.py`).
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import pathlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from experiments.benchmarks import timing
from experiments.study import workers as pool
from experiments.study.shared_steps import SharedStep
from experiments.study.sweeps import nested
from moe_jax import command_line, data, evaluation
from moe_jax.config import merge, to_dataclass
from moe_jax.hooks import Facts
from moe_jax.runs import metrics
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.loop import train_and_evaluate
from moe_jax.training.setup import Hook, Run
from moe_jax.training.step import TrainState

RESULT = 'result.json'


@dataclasses.dataclass(frozen=True)
class Job:
  """One run.

  Attributes:
    arm: Whose; a `study.Arm`.
    seed: Of parameters, of the order of the data and of all noise.
    config: The whole of it.
    workdir: Named after the arm, the seed and the config's hash.
  """

  arm: Any
  seed: int
  config: ml_collections.ConfigDict
  workdir: pathlib.Path

  @property
  def name(self) -> str:
    """For people."""
    return f'{self.arm.name}, seed {self.seed}'


def jobs(
  shared: ml_collections.ConfigDict,
  arms: Sequence[Any],
  seeds: Sequence[int],
  output: pathlib.Path,
) -> list[Job]:
  """Every arm on every seed; seeds are the outer loop.

  Raises:
    ValueError: Two arms have one name, or a key does not exist.
  """
  names = [arm.name for arm in arms]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f'two arms are named {name!r}')
  made = []
  for seed in seeds:
    for arm in arms:
      config = merge(shared, {'seed': seed, **nested(arm.overrides)})
      short = re.sub(r'[^A-Za-z0-9.]+', '_', arm.name).strip('_')
      folder = f'seed{seed}-{config_hash(config)}'
      made.append(Job(arm, seed, config, output / 'runs' / short / folder))
  return made


def config_hash(config: ml_collections.ConfigDict) -> str:
  """Equal for equal configs, whatever their keys' order."""
  text = json.dumps(config.to_dict(), sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:10]


class _Ending(Hook):
  """Remembers what a run was trained on, and measures what it came to."""

  def __init__(self, measure):
    self._measure = measure
    self.found: dict[str, Any] = {}

  def start(self, run: Run) -> None:
    self.found['data_digest'] = run.dataset.digest

  def end(self, run: Run, state: TrainState) -> None:
    if self._measure is not None:
      self.found |= self._measure(run, state)


def run_one(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  measure=None,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
  """One run's result: its last row of each key, and what `measure` adds.

  Raises:
    SystemExit: It was stopped by SIGTERM; the same call goes on.
  """
  workdir_lib.check(workdir, config)
  path, start = workdir / RESULT, time.perf_counter()
  if not path.exists():
    ending = _Ending(measure)
    state = train_and_evaluate(
      config,
      workdir,
      hooks=[Facts(), SharedStep(), ending],
      devices=devices,
      kinds=evaluation.KINDS,
    )
    if int(state.step) < config.total_steps:
      raise SystemExit(command_line.STOPPED)
    last = {}
    for row in metrics.read_metrics(workdir / metrics.FILE_NAME):
      last |= row
    made = {**timing.facts(), 'minutes': (time.perf_counter() - start) / 60}
    text = json.dumps({**last, **ending.found, 'made': made}, indent=2)
    workdir_lib.write_text(path, text + '\n')
    # A sweep's checkpoints would fill a disk.
    shutil.rmtree(workdir / workdir_lib.CHECKPOINTS, ignore_errors=True)
  return json.loads(path.read_text(encoding='utf-8'))


def read_all(jobs: Sequence[Job]) -> dict[str, list[dict[str, Any]]]:
  """The results of finished runs by arm, one a seed.

  Raises:
    ValueError: Two runs of one source saw different data.
  """
  results: dict[str, list[dict[str, Any]]] = {}
  digests: dict[str, set[str]] = {}
  for job in jobs:
    result = json.loads((job.workdir / RESULT).read_text(encoding='utf-8'))
    results.setdefault(job.arm.name, []).append(result)
    source = json.dumps(job.config.data.to_dict(), default=list)
    digests.setdefault(source, set()).add(result['data_digest'])
  for found in digests.values():
    if len(found) > 1:
      raise ValueError(f'runs saw different data: sha256 {sorted(found)}')
  return results


def run_all(study: Any, jobs: Sequence[Job], workers: int = 0) -> None:
  """Makes the runs that are missing.

  Args:
    study: Its `measure` is taken of every run, its first column printed.
    jobs: All of them.
    workers: Runs at a time; 0: one a core of a CPU, one on accelerators.
      1: in this process.
  """
  left = [job for job in jobs if not (job.workdir / RESULT).exists()]
  print(f'{len(jobs)} runs, {len(jobs) - len(left)} of them there', flush=True)
  if not left:
    return
  workers = min(workers or pool.usual(), len(left))
  output = jobs[0].workdir.parents[2]
  with _alone(output):
    for section in {job.config.data.to_json_best_effort() for job in left}:
      options = ml_collections.ConfigDict(json.loads(section))
      data.load(to_dataclass(data.DataConfig, options))
    progress = _Progress(study, left, workers)
    run = functools.partial(_logged, measure=study.measure)
    with contextlib.closing(pool.over(run, left, workers)) as ended:
      for job, result in ended:
        progress.ended(job, result)


def _logged(job: Job, measure) -> dict[str, Any]:
  job.workdir.mkdir(parents=True, exist_ok=True)
  with (
    (job.workdir / 'log.txt').open('a', encoding='utf-8') as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    return run_one(job.config, job.workdir, measure)


@contextlib.contextmanager
def _alone(output: pathlib.Path) -> Iterator[None]:
  """Holds the folder for this process.

  Raises:
    ValueError: Another process runs there.
  """
  output.mkdir(parents=True, exist_ok=True)
  with (output / 'lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise ValueError(f'another process runs in {output}') from None
    yield


class _Progress:
  """A line a run, with the time that is left by the steps that are."""

  def __init__(self, study, left: Sequence[Job], workers: int):
    self._column = study.columns[0]
    self._steps = sum(job.config.total_steps for job in left)
    self._total = len(left)
    self._ended = self._done = 0
    self._start = time.perf_counter()
    print(f'{workers} at a time, {self._steps:,} steps', flush=True)

  def ended(self, job: Job, result: Mapping[str, Any]) -> None:
    """Says so."""
    self._ended += 1
    self._done += job.config.total_steps
    gone = time.perf_counter() - self._start
    left = gone * (self._steps - self._done) / self._done
    value = f'{self._column.name} {self._column.of(result):.4f}'
    print(
      f'[{self._ended}/{self._total}] {job.name}: {value}; '
      f'{gone / 60:.1f} minutes gone, {left / 60:.1f} left',
      flush=True,
    )
