"""Evaluations by name, each with its period and its own model overrides.

The kind 'loss' is here. Others come from above as functions by name, `Kind`:
they look at an entry's keys before anything compiles, and give back what
measures. Not here: those kinds (`moe_jax.evaluation`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from moe_jax import data, models
from moe_jax.config import merge, to_dataclass, unknown
from moe_jax.distributed import Placing
from moe_jax.models import Model, abstract_params
from moe_jax.runs import summary
from moe_jax.runs.metrics import Row
from moe_jax.training.step import eval_step
from moe_jax.training_types import LossSums, add

# Keys that entries of every kind have; the others are the kind's options.
COMMON = ('kind', 'every_steps', 'model_overrides')


@dataclasses.dataclass(frozen=True)
class Setting:
  """What an entry of `config.evals` is about.

  Attributes:
    name: Its key.
    options: Its keys but for `COMMON`.
    config: The run's, with the entry's overrides.
    model: The training model with the entry's overrides.
    dataset: The run's.
    workdir: The run's folder, which need not exist yet.
    put: Moves batches of numpy arrays of `config.batch_size` rows to devices.
  """

  name: str
  options: dict[str, Any]
  config: ml_collections.ConfigDict
  model: Model
  dataset: data.Dataset
  workdir: pathlib.Path
  put: Placing


Variables = dict[str, Any]  # 'params', and 'router_state' if there is any
Measure = Callable[[Variables, int], Row]  # (variables, step)
Kind = Callable[[Setting], Measure]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One entry of `config.evals`, ready to run.

  Attributes:
    name: Its key.
    every_steps: Its period; 0 is at the end only.
    measure: (variables, step) -> its row.
  """

  name: str
  every_steps: int
  measure: Measure

  def due(self, step: int) -> bool:
    """Whether it runs after `step` steps, the end apart."""
    return self.every_steps > 0 and step % self.every_steps == 0


def make_evaluations(
  config: ml_collections.ConfigDict,
  model: Model,
  *,
  dataset: data.Dataset,
  workdir: pathlib.Path,
  put: Placing,
  kinds: Mapping[str, Kind],
) -> list[Evaluation]:
  """All entries of `config.evals`, models built.

  Args:
    config: The run's, with the vocabulary's size filled in.
    model: The training model.
    dataset: The run's.
    workdir: The run's folder.
    put: See `Setting`.
    kinds: Beside 'loss'.

  Raises:
    ValueError: As `changed_models` or the kind; said with the entry's name.
  """
  changed = changed_models(config, model)
  kinds = {'loss': loss, **kinds}
  evaluations = []
  for name, entry in config.evals.items():
    setting = Setting(
      name=name,
      options={key: entry[key] for key in entry if key not in COMMON},
      config=_overridden(config, entry),
      model=changed[name],
      dataset=dataset,
      workdir=workdir,
      put=put,
    )
    try:
      measure = kinds[entry.kind](setting)
    except ValueError as error:
      raise ValueError(f'evals.{name}: {error}') from error
    evaluations.append(Evaluation(name, entry.every_steps, measure))
  return evaluations


def check_entries(
  config: ml_collections.ConfigDict, kinds: Mapping[str, Kind]
) -> None:
  """Whether each entry is of a kind, and has what every kind needs.

  Raises:
    ValueError: An entry lacks a key, its kind is unknown, its period negative.
  """
  for name, entry in config.evals.items():
    for key in COMMON:
      if key not in entry:
        raise ValueError(f'evals.{name} has no {key!r}')
    if entry.kind not in ('loss', *kinds):
      raise unknown(f'evals.{name}.kind', entry.kind, ['loss', *kinds])
    if entry.every_steps < 0:
      raise ValueError(f'evals.{name}: every_steps={entry.every_steps} < 0')


def changed_models(
  config: ml_collections.ConfigDict, model: Model
) -> dict[str, Model]:
  """The model of each entry of `config.evals`, by name.

  Raises:
    ValueError: An override is unknown, or its parameters are not the training
      model's; the differing ones are listed.
  """
  changed = {}
  for name, entry in config.evals.items():
    changed[name] = models.build(_overridden(config, entry))
    _check_same_parameters(name, model, changed[name], config.data.seq_len)
  return changed


def measured(
  evaluations: Sequence[Evaluation], variables: Variables, step: int
) -> dict[str, Row]:
  """The row of each evaluation, by name; what is equal is measured once."""
  done: dict[Measure, Row] = {}
  for e in evaluations:
    if e.measure not in done:
      done[e.measure] = e.measure(variables, step)
  return {e.name: done[e.measure] for e in evaluations}


@dataclasses.dataclass(frozen=True)
class LossOptions:
  """The keys of an entry of kind 'loss'.

  Attributes:
    num_batches: 0 is the whole split.
  """

  num_batches: int

  def __post_init__(self):
    if self.num_batches < 0:
      raise ValueError(f'num_batches={self.num_batches} must not be negative')


def loss(setting: Setting) -> Measure:
  """The kind 'loss': of the validation split, with what routers did.

  Raises:
    ValueError: A key is unknown, missing or out of range.
  """
  options = to_dataclass(LossOptions, setting.options)
  return Losses(
    model=setting.model,
    num_batches=options.num_batches,
    batch_size=setting.config.batch_size,
    rows=setting.dataset.splits['validation'],
    put=setting.put,
  )


@dataclasses.dataclass(frozen=True)
class Losses:
  """Measures losses; equal for equal models and lengths on the same rows.

  Attributes:
    model: What is evaluated.
    num_batches: 0 is all rows.
    batch_size: B, global.
    rows: The split.
    put: Moves batches to devices.
  """

  model: Model
  num_batches: int
  batch_size: int
  rows: data.Rows
  put: Placing

  def __call__(self, variables: Variables, step: int) -> Row:
    """See `summary.summarize`."""
    del step
    return summary.summarize(self.sums(variables))

  def sums(self, variables: Variables) -> LossSums:
    """Over all batches, as float64 numpy."""
    run = compiled_eval_step(self.model)
    total = None
    for batch in data.eval_batches(
      self.rows,
      batch_size=self.batch_size,
      num_batches=self.num_batches,
      share=self.put.rows,
    ):
      # Added on the host in float64: a split has more tokens than float32
      # has whole numbers.
      sums = summary.host(run(variables, self.put.local(batch)))
      total = sums if total is None else add(total, sums)
    return total


@functools.lru_cache(maxsize=16)
def compiled_eval_step(model: Model):
  """`eval_step` of one model, compiled once a process."""
  return jax.jit(functools.partial(eval_step, model=model))


def _overridden(config, entry) -> ml_collections.ConfigDict:
  return merge(config, {'model': entry.model_overrides.to_dict()})


def _check_same_parameters(name, model, changed_model, seq_len):
  if changed_model == model:
    return
  trees = []
  for each in (model, changed_model):
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(each, seq_len))
    trees.append(
      {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
    )
  old, new = trees
  differing = [
    f'  {key}: {old.get(key)} -> {new.get(key)}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]
  if differing:
    raise ValueError(
      f'evals.{name}.model_overrides changes parameters:\n'
      + '\n'.join(differing[:10])
    )
