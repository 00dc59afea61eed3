"""The entries of `config.evals`: their models, checks, and functions."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from moe_jax import models, sections
from moe_jax.data import DataOptions, Dataset
from moe_jax.distributed import Placing
from moe_jax.errors import InputError
from moe_jax.models import MODELS, Model, ModelOptions
from moe_jax.options import OptionError
from moe_jax.partitioning import Rules
from moe_jax.training.evaluate import Evaluation, EvaluationOptions, Setting

_MOST_LISTED = 10


def overridden(
  model: ModelOptions, entry: EvaluationOptions
) -> tuple[ModelOptions, dict[str, Any]]:
  """The options of an entry's model, and its overrides without effect.

  Raises:
    OptionError: The message lists all problems of the overrides.
  """
  return sections.overridden(MODELS, model, entry.model_overrides, 'model.')


def override_problems(
  model: ModelOptions, entries: Mapping[str, EvaluationOptions]
) -> Iterator[str]:
  """The problems of the overrides of all entries, a text for each."""
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
) -> dict[str, Model]:
  """The model of each entry, by name.

  Args:
    options: The options of the training model, after `filled`.
    model: The training model.
    entries: The evaluations.
    rules: The sharding table.

  Raises:
    OptionError: Parameters of some models differ from those of the training
      model; they are listed.
  """
  entry_models, problems = {}, []
  for name, entry in entries.items():
    entry_models[name] = overridden(options, entry)[0].build(rules)
    if differing := _differing_parameters(model, entry_models[name]):
      problems.append(
        f'evals.{name}.model_overrides changes parameters:\n'
        + '\n'.join(differing[:_MOST_LISTED])
      )
  if problems:
    raise OptionError(problems)
  return entry_models


def make_evaluations(
  entries: Mapping[str, EvaluationOptions],
  entry_models: Mapping[str, Model],
  *,
  dataset: Dataset,
  data: DataOptions,
  batch_size: int,
  workdir: pathlib.Path,
  put: Placing,
) -> list[Evaluation]:
  """All entries, ready to run.

  Args:
    entries: The options of each entry, by name.
    entry_models: The model of each entry, by name; see `changed_models`.
    dataset: The run's data.
    data: The options of the dataset.
    batch_size: Number of rows in a global batch.
    workdir: The run's folder.
    put: Moves batches of numpy arrays to the devices.

  Raises:
    OptionError: The run lacks what some evaluations need; all are named.
  """
  evaluations, problems = [], []
  for name, entry in entries.items():
    setting = Setting(
      name, entry_models[name], dataset, data, batch_size, workdir, put
    )
    try:
      measure = entry.measure(setting)
    except InputError as error:
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


def _differing_parameters(model: Model, changed: Model) -> list[str]:
  """A line for each parameter whose shape differs between two models."""
  if changed == model:
    return []
  old, new = (
    {
      jax.tree_util.keystr(path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(
        models.abstract_params(compared)
      )
    }
    for compared in (model, changed)
  )
  return [
    f'  {key}: {old.get(key)} -> {new.get(key)}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]
