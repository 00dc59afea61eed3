"""Evaluation of a run's folder, without training."""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax import data, generation, partitioning
from moe_jax.devices import Placing
from moe_jax.runs.metrics import Row
from moe_jax.training.evaluate import (
  EvaluationOptions,
  Setting,
  evaluation_rows,
  make_evaluations,
)

_NAME = 'evaluate'  # name of the evaluation, and of its file of examples


def evaluate(
  workdir: str | os.PathLike[str], entry: EvaluationOptions, **arguments: Any
) -> Row:
  """The metrics that an evaluation of any kind measures for a run's folder.

  Args:
    workdir: The run's folder.
    entry: The options of the evaluation, as in an entry of `config.evals`; its
      `every_steps` is ignored.
    **arguments: Other arguments of `evaluate_all`; errors are those that it
      raises.
  """
  return evaluate_all(workdir, {_NAME: entry}, **arguments)[_NAME]


def evaluate_all(
  workdir: str | os.PathLike[str],
  entries: Mapping[str, EvaluationOptions],
  *,
  mesh: Mesh | None = None,
  **arguments: Any,
) -> dict[str, Row]:
  """The metrics that evaluations measure for a run's folder, by their names.

  Args:
    workdir: The run's folder.
    entries: The options of each evaluation, by name; `every_steps` is ignored.
    mesh: The devices of the parameters; None is the first local device.
    **arguments: `step` of the checkpoint, None for the newest good one; `dtype`
      of parameters, '' for the run's own; `allow`, the modules whose classes,
      named in the run's config, may be imported.

  Raises:
    ValueError: `generation.load` refuses the folder or an argument, or the run
      lacks what the evaluation needs.
    CheckpointError: No checkpoint is good.
  """
  if mesh is None:
    mesh = partitioning.make_mesh(dict(data=1), jax.local_devices()[:1])
  run = generation.load(workdir, mesh=mesh, **arguments)
  options = run.options
  size, rules = options.batch_size, options.sharding.rules
  shape = size, options.data.seq_len
  sharding = partitioning.sharding(
    mesh, rules, ('batch', None), shape, 'a batch'
  )
  # A batch has as many microbatches as fit the mesh, which may be fewer than in
  # training.
  rows = size // partitioning.row_parts(mesh, rules)
  microbatches = math.gcd(options.microbatches, rows)
  dataset, put = data.load(options.data), Placing(sharding, size, microbatches)
  setting = Setting(run.model, dataset, options.data, run.folder, put)
  evaluations = make_evaluations(entries, options.model, rules, setting)
  return evaluation_rows(evaluations, run.variables, run.step)
