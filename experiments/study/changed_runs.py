"""Runs that are made of trained ones, by merging, quantising and the like.

An arm with a `change` begins with a start, as an arm that is fine-tuned does.
Its runs are not trained: the change makes a new run's folder, which is then
evaluated by all entries of the config's `evals`. Where a `Start` has a change,
other arms are trained from what it makes.

    Arm('int4', {}, start='trained', change=functools.partial(quantized, 4))
"""

import shutil
from typing import Any

from experiments.study.jobs import Job
from moe_jax import data, evaluation, run_config


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
  metrics = {
    f'eval/{name}/{key}': value
    for name, row in rows.items()
    for key, value in row.items()
  }
  digest = data.load(options.data).digest
  return {**metrics, **numbers, 'data_digest': digest}
