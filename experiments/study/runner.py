"""Makes the runs of a study, by training unless it has another runner."""

import dataclasses
import functools
import hashlib
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

import moe_jax
from experiments.benchmarks import timing
from experiments.study.jobs import Job
from experiments.study.parts import Result
from experiments.study.shared_steps import SharedStep
from moe_jax import cli, data, evaluation, run_config
from moe_jax.analysis.hooks import Facts
from moe_jax.analysis.recording import Traces
from moe_jax.compression.distill import Distilling
from moe_jax.config import Options, read_options
from moe_jax.run_config import RunConfig
from moe_jax.runs import metrics
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.loop import train_and_evaluate
from moe_jax.training.setup import Ended, Hook, Run
from moe_jax.training.step import TrainState

# A function that measures a trained run.
Measure = Callable[[Run, TrainState], Mapping[str, Any]]


class Runner:
  """Interface of the objects that make the runs of a study.

  A runner must be picklable, since it is sent to worker processes.

  Attributes:
    options: Class of the options that the runs' configs describe. It has the
      fields `seed`, `total_steps` and `data`.
  """

  options: ClassVar[type[Options]]

  def prepare(self, jobs: Sequence[Job]) -> None:
    """Prepares once, in the parent process, the data that all runs read."""

  def together(self, job: Job) -> str:
    """A key that is equal for jobs to be made in one call of the runner."""
    return job.name

  def __call__(self, jobs: Sequence[Job]) -> None:
    """Makes the runs of one call and writes their results.

    Raises:
      SystemExit: SIGTERM stopped the runs; the same call continues them later.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TrainingRunner(Runner):
  """Trains each run by itself; similar runs share a compiled step.

  Attributes:
    measure: Function of a trained run and its state whose numbers are added to
      the run's metrics; None adds none.
  """

  options: ClassVar[type[Options]] = RunConfig

  measure: Measure | None = None

  def prepare(self, jobs: Sequence[Job]) -> None:
    """Prepares the data, which workers then read from the cache."""
    prepared: list[data.DataOptions] = []  # a mixture's options have no hash
    for job in jobs:
      options = read_options(data.DataOptions, job.config.data, 'data.')
      if options not in prepared:
        data.load(options)
        prepared.append(options)

  def __call__(self, jobs: Sequence[Job]) -> None:
    """Trains the runs."""
    for job in jobs:
      train(job, self.measure)


class _Ending(Ended):
  """Records the digest of a run's data, and measures the run at its end."""

  def __init__(self, measure: Measure | None):
    self._measure = measure
    self.numbers: dict[str, Any] = {}

  def start(self, run: Run) -> None:
    self.numbers['data_digest'] = run.dataset.digest

  def end(self, run: Run, state: TrainState) -> None:
    super().end(run, state)
    if self._measure is not None:
      self.numbers |= self._measure(run, state)


def train(
  job: Job,
  measure: Measure | None = None,
  devices: Sequence[jax.Device] | None = None,
  hooks: Sequence[Hook] = (),
) -> Result:
  """Trains a run, or makes it of another, and returns its result.

  A run that has a result already is not made again.

  Args:
    job: The run.
    measure: Function of the trained run, as in `TrainingRunner`.
    devices: Devices of the mesh; None takes all.
    hooks: More hooks of a run that is trained; they may wrap its step.

  Raises:
    SystemExit: SIGTERM stopped the run; the same call continues it.
  """
  if job.is_finished:
    return job.result()
  start, has_change = time.perf_counter(), job.arm.change is not None
  last = changed(job) if has_change else _trained(job, measure, devices, hooks)
  job.write_result({**last, 'made': provenance(start)})
  if not job.keeps:  # parameters of all runs would fill a disk
    parameters = job.workdir / workdir_lib.CHECKPOINTS
    shutil.rmtree(job.folder if has_change else parameters, ignore_errors=True)
  return job.result()


def _trained(job, measure, devices, hooks) -> dict[str, Any]:
  """Trains a run; returns its last metrics."""
  ending, distilling = _Ending(measure), Distilling(('experiments',))
  train_and_evaluate(
    run_config.read(job.config),
    job.workdir,
    hooks=[Facts(), SharedStep(), distilling, Traces(), *hooks, ending],
    devices=devices,
    initial=distilling.initial,
  )
  if not ending.ended:
    raise SystemExit(cli.STOPPED)
  last = {}
  for row in metrics.read_metrics(job.workdir / metrics.FILE_NAME):
    last |= row
  return {**last, **ending.numbers}


def provenance(start: float) -> dict[str, Any]:
  """Device, date, versions and code of a run that ends now, and its minutes.

  Args:
    start: Value of `time.perf_counter` when the run began.
  """
  minutes = (time.perf_counter() - start) / 60
  return {**timing.facts(), 'code': code_digest(), 'minutes': minutes}


@functools.cache
def code_digest() -> str:
  """A short hash of the text of all modules of `moe_jax`, which decide a run.

  Any change of their text counts, also one of a comment: it is a mark on stored
  results, no reason to withhold them.
  """
  folder = pathlib.Path(moe_jax.__file__).parent
  hashed = hashlib.sha256()
  for path in sorted(folder.rglob('*.py')):
    hashed.update(str(path.relative_to(folder)).encode() + b'\0')
    hashed.update(path.read_bytes())
  return hashed.hexdigest()[:12]


def arrays_digest(splits: Sequence[Sequence[np.ndarray]], kind: str) -> str:
  """The sha256 of the arrays of a training and of a validation split.

  Args:
    splits: Arrays of both.
    kind: Text about the arrays, such as the names of classes, hashed with each.
  """
  sha256 = hashlib.sha256()
  for name, arrays in zip(('train', 'validation'), splits, strict=True):
    sha256.update(f'split {name}\n{kind}\n'.encode())
    for array in arrays:
      sha256.update(f'{array.shape} {array.dtype}\n'.encode())
      sha256.update(np.ascontiguousarray(array).tobytes())
  return sha256.hexdigest()


def changed(job: Job) -> dict[str, Any]:
  """Makes a run of another one; returns its metrics.

  The metrics are those of the evaluations, named as in training, and the
  numbers that the change returns, by the names that it gives them. Files that a
  killed call has left in the run's folder are removed first.

  Args:
    job: A run whose arm has a change.
  """
  shutil.rmtree(job.folder, ignore_errors=True)
  numbers = job.arm.change(job.begins_with, job.folder)
  options = run_config.read(job.config)
  rows = evaluation.evaluate_all(job.folder, options.evals)
  losses = {
    f'eval/{name}/{key}': value
    for name, row in rows.items()
    for key, value in row.items()
  }
  return {**losses, **numbers, 'data_digest': data.load(options.data).digest}
