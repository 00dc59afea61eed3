"""Evaluations by name, each with its period and its own model overrides."""

import dataclasses
import functools

import jax
import ml_collections

from moe_jax import data, models
from moe_jax.config import merge, unknown
from moe_jax.models import Model, abstract_params
from moe_jax.training import summary
from moe_jax.training.losses import LossSums, add
from moe_jax.training.step import eval_step

KINDS = ('loss',)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One entry of `config.evals`, ready to run.

  Attributes:
    name: Its key.
    every_steps: Its period; 0 is at the end only.
    num_batches: 0 is the whole split.
    model: The training model with the entry's overrides.
  """

  name: str
  every_steps: int
  num_batches: int
  model: Model

  def due(self, step: int) -> bool:
    """Whether it runs after `step` steps, the end apart."""
    return self.every_steps > 0 and step % self.every_steps == 0


def make_evaluations(
  config: ml_collections.ConfigDict, model: Model
) -> list[Evaluation]:
  """All entries of `config.evals`, models built.

  Raises:
    ValueError: An entry's kind or override is unknown, or its parameters are
      not the training model's; the differing ones are listed.
  """
  evaluations = []
  for name, entry in config.evals.items():
    if entry.kind not in KINDS:
      raise unknown(f'evals.{name}.kind', entry.kind, KINDS)
    if entry.every_steps < 0 or entry.num_batches < 0:
      raise ValueError(
        f'evals.{name}: every_steps={entry.every_steps} and num_batches='
        f'{entry.num_batches} must not be negative'
      )
    overrides = entry.model_overrides.to_dict()
    changed = merge(config, {'model': overrides})
    changed_model = models.build(changed)
    _check_same_parameters(name, model, changed_model, config.data.seq_len)
    evaluations.append(
      Evaluation(name, entry.every_steps, entry.num_batches, changed_model)
    )
  return evaluations


class Evaluator:
  """Runs evaluations on one split; equal models and lengths run once a time."""

  def __init__(self, rows: data.Rows, batch_size: int, put):
    """Compiles nothing yet.

    Args:
      rows: The split.
      batch_size: B, global.
      put: Moves a batch of numpy arrays to devices.
    """
    self._rows, self._batch_size, self._put = rows, batch_size, put

  def __call__(
    self, evaluations: list[Evaluation], params
  ) -> dict[str, LossSums]:
    """The sums of each evaluation, by name, as float64 numpy."""
    done: dict[tuple, LossSums] = {}
    for e in evaluations:
      key = (e.model, e.num_batches)
      if key not in done:
        done[key] = self._run(e, params)
    return {e.name: done[e.model, e.num_batches] for e in evaluations}

  def _run(self, evaluation: Evaluation, params) -> LossSums:
    step = compiled_eval_step(evaluation.model)
    total = None
    for batch in data.eval_batches(
      self._rows,
      batch_size=self._batch_size,
      num_batches=evaluation.num_batches,
    ):
      sums = step(params, self._put(batch))
      # Added on the host in float64: a split has more tokens than float32
      # has whole numbers.
      sums = summary.host(sums)
      total = sums if total is None else add(total, sums)
    return total


@functools.lru_cache(maxsize=16)
def compiled_eval_step(model: Model):
  """`eval_step` of one model, compiled once a process."""
  return jax.jit(functools.partial(eval_step, model=model))


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
