"""A study's runs: one process a core, kept by the hash of their config.

A run that is finished is read, one that was killed begins anew (what SIGTERM
stopped goes on), and runs that differ in loss weights and seeds alone share a
compiled step. Not here: what a study asks (`study.py`).
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from jax.experimental.compilation_cache import compilation_cache

from experiments import timing
from experiments.shared_steps import SharedStep
from experiments.sweeps import nested
from moe_jax import command_line, data, evaluation, host
from moe_jax.config import merge, to_dataclass
from moe_jax.hooks import Facts
from moe_jax.training import metrics
from moe_jax.training import workdir as workdir_lib
from moe_jax.training.loop import train_and_evaluate
from moe_jax.training.setup import Hook, Run
from moe_jax.training.step import TrainState

RESULT = 'result.json'
_CACHE = (
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
)
_WATCH_SECONDS = 0.5


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
  cores = _cores()
  if not workers:
    workers = len(cores) if jax.default_backend() == 'cpu' else 1
  workers = min(workers, len(left))
  output = jobs[0].workdir.parents[2]
  with _alone(output), tempfile.TemporaryDirectory() as cache:
    for section in {job.config.data.to_json_best_effort() for job in left}:
      options = ml_collections.ConfigDict(json.loads(section))
      data.load(to_dataclass(data.DataConfig, options))
    progress = _Progress(study, left, workers)
    if workers == 1:
      before = {name: getattr(jax.config, name) for name in _CACHE}
      _share_compiled(cache)
      try:
        for job in left:
          progress.ended(job, _logged(job, study.measure))
      except SystemExit:
        print(_STOPPED, flush=True)
        raise
      finally:
        for name, value in before.items():
          jax.config.update(name, value)
        compilation_cache.reset_cache()
    else:
      _in_processes(study, left, workers, (cache, cores), progress)


def _cores() -> list[int]:
  """Those that this process may use; macOS does not say which."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def _in_processes(study, left, workers, place, progress) -> None:
  context = multiprocessing.get_context('spawn')
  number, stopping = context.Value('i', 0), context.Event()
  with concurrent.futures.ProcessPoolExecutor(
    workers, context, _begin, (number, stopping, os.getpid(), *place)
  ) as pool:
    futures = {pool.submit(_unless, job, study.measure): job for job in left}
    before = signal.signal(signal.SIGTERM, _stop)
    try:
      for future in concurrent.futures.as_completed(futures):
        progress.ended(futures[future], future.result())
    except BaseException:
      # Those that run save; of the rest some may be queued in a worker.
      stopping.set()
      for process in multiprocessing.active_children():
        process.terminate()
      pool.shutdown(cancel_futures=True)
      raise
    finally:
      signal.signal(signal.SIGTERM, before)


def _stop(number, frame) -> None:
  """Of SIGTERM: as main, it ends with a status that says to start again."""
  del number, frame
  print(_STOPPED, flush=True)
  raise SystemExit(command_line.STOPPED)


_STOPPED = 'stopped by SIGTERM; the same command goes on'
_stopping = None  # of a worker: an event, set once no other run is to begin


def _unless(job: Job, measure) -> dict[str, Any]:
  if _stopping.is_set():
    raise SystemExit('the study was stopped')
  return _logged(job, measure)


def _begin(
  number, stopping, parent: int, cache: str, cores: Sequence[int]
) -> None:
  """A worker's start: a core of its own, and no life beyond its parent's."""
  global _stopping
  _stopping = stopping
  with number.get_lock():
    own = cores[number.value % len(cores)]
    number.value += 1
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {own})
  host.keep_freed_memory()
  _share_compiled(cache)

  def watch():
    while os.getppid() == parent:
      time.sleep(_WATCH_SECONDS)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _share_compiled(cache: str) -> None:
  for name, value in zip(_CACHE, (cache, 0.2), strict=True):
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # one that is open stays where it was


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
