"""The entries of `config.evals`: their models, checked, and what measures.

Not here: what an evaluation measures (`evaluate.py`).
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from moe_jax import models, sections
from moe_jax.data import DataOptions, Dataset
from moe_jax.distributed import Placing
from moe_jax.models import MODELS, Model, ModelOptions
from moe_jax.options import OptionError
from moe_jax.partitioning import Rules
from moe_jax.training.evaluate import Evaluation, EvaluationOptions, Setting

_MOST_LISTED = 10


def overridden(
  model: ModelOptions, entry: EvaluationOptions
) -> tuple[ModelOptions, dict[str, Any]]:
  """The model of an entry, and its overrides that have no effect.

  Raises:
    OptionError: All that is wrong with the overrides.
  """
  return sections.overridden(MODELS, model, entry.model_overrides, 'model.')


def override_problems(
  model: ModelOptions, entries: Mapping[str, EvaluationOptions]
) -> Iterator[str]:
  """What is wrong with the overrides of entries, each text a problem."""
  for name, entry in entries.items():
    try:
      overridden(model, entry)
    except OptionError as error:
      for text in error.problems:
        yield f'evals.{name}.model_overrides: {text}'


def changed_models(
  options: ModelOptions,
  model: Model,
  entries: Mapping[str, EvaluationOptions],
  rules: Rules,
  seq_len: int,
) -> dict[str, Model]:
  """The model of each entry, by name.

  Args:
    options: The options of the training model, filled in.
    model: The training model.
    entries: The evaluations.
    rules: The sharding table.
    seq_len: The length of a row.

  Raises:
    ValueError: The parameters of some are not those of the training model; the
      differing ones are listed.
  """
  changed, problems = {}, []
  for name, entry in entries.items():
    changed[name] = overridden(options, entry)[0].build(rules)
    if differing := _differing_parameters(model, changed[name], seq_len):
      problems.append(
        f'evals.{name}.model_overrides changes parameters:\n'
        + '\n'.join(differing[:_MOST_LISTED])
      )
  if problems:
    raise OptionError(problems)
  return changed


def make_evaluations(
  entries: Mapping[str, EvaluationOptions],
  changed: Mapping[str, Model],
  *,
  dataset: Dataset,
  data: DataOptions,
  batch_size: int,
  workdir: pathlib.Path,
  put: Placing,
) -> list[Evaluation]:
  """All entries, ready to run.

  Args:
    entries: Their options by name.
    changed: Their models; see `changed_models`.
    dataset: See `Setting`, also for what follows.
    data: The options of the dataset.
    batch_size: Number of rows in a global batch.
    workdir: The run's folder.
    put: Moves batches to the devices.

  Raises:
    ValueError: The run lacks what some evaluation needs; all are named.
  """
  evaluations, problems = [], []
  for name, entry in entries.items():
    setting = Setting(
      name, changed[name], dataset, data, batch_size, workdir, put
    )
    try:
      measure = entry.measure(setting)
    except ValueError as error:
      problems.append(f'evals.{name}: {error}')
      continue
    if not callable(measure):
      problems.append(
        f'evals.{name}: `measure` of {type(entry).__name__} returned '
        f'{measure!r:.80}; it must return a function of variables and a step'
      )
      continue
    evaluations.append(Evaluation(name, entry.every_steps, measure))
  if problems:
    raise OptionError(problems)
  return evaluations


def _differing_parameters(
  model: Model, changed: Model, seq_len: int
) -> list[str]:
  """A line for each parameter that two models do not have alike."""
  if changed == model:
    return []
  old, new = (
    {
      jax.tree_util.keystr(path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(
        models.abstract_params(each, seq_len)
      )
    }
    for each in (model, changed)
  )
  return [
    f'  {key}: {old.get(key)} -> {new.get(key)}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]
