"""Evaluations of a run: the contract of their kinds, and the kind 'loss'.

Each entry of `config.evals` is an evaluation, with a name, a period and its own
overrides of the model.
"""

import collections
import contextlib
import contextvars
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax

from moe_jax import models
from moe_jax.config import OptionError, Options, option, overridden, required
from moe_jax.data import SPLITS, DataOptions, Dataset, Rows, eval_batches
from moe_jax.devices import Placing
from moe_jax.errors import InputError
from moe_jax.models import MODELS, Model, ModelOptions
from moe_jax.models.recorded import Apply, Choices, plainly
from moe_jax.partitioning import Rules
from moe_jax.runs import manifest, summary
from moe_jax.runs.metrics import Row
from moe_jax.training.losses import loss_sums
from moe_jax.training.step import over_slices

Variables = dict[str, Any]  # 'params', and 'router_state' if the model has it
Measure = Callable[[Variables, int], Row]  # (variables, step) -> row
# (index of the batch, batch, choices of experts) -> nothing
Record = Callable[[int, dict[str, jax.Array], Choices], None]
R = TypeVar('R')
_IN_FLIGHT = 2  # batches that the devices compute while sums are read
# The function that says whether a signal stops the evaluation in progress.
_SHOULD_STOP: contextvars.ContextVar[Callable[[], bool]] = (
  contextvars.ContextVar('should_stop', default=lambda: False)
)
# Overrides of the model that give every expert room for all tokens.
ROOM_FOR_ALL = {
  'moe': {'capacity': {'kind': 'all'}, 'dispatch': {'kind': 'dropless'}}
}
# Overrides of the model that give experts twice the room of a balanced load.
_ROOM_FOR_TWICE = {
  'moe': {
    'capacity': {'kind': 'per_assignment', 'per_assignment': {'factor': 2.0}},
    'dispatch': {'kind': 'gather'},
  }
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """The parts of a run that an evaluation may use.

  Attributes:
    model: The training model with the overrides of the evaluation.
    dataset: The run's data.
    data: The options of the dataset.
    workdir: The run's folder, which need not exist yet.
    put: Moves batches of numpy arrays to the devices, and knows how many rows a
      batch has.
    name: The name of the evaluation, an entry of `config.evals`.
  """

  model: Model
  dataset: Dataset
  data: DataOptions
  workdir: pathlib.Path
  put: Placing
  name: str = ''


def every_steps_option(every_steps: int) -> Any:
  """The field `every_steps` of a kind of evaluation, with its own default."""
  return option(
    every_steps,
    'Number of optimizer steps between two measurements of the evaluation, '
    'which also runs at the end of the run; with 0 it runs only then.',
    minimum=0,
  )


@dataclasses.dataclass(frozen=True)
class EvaluationOptions(Options):
  """The base of the kinds of evaluation, which override `measure`."""

  every_steps: int = every_steps_option(0)
  model_overrides: Mapping[str, Any] = option(
    {},
    'Keys of the section `model`, nested, with the values that they have in '
    'this evaluation; they must not change the shape of a parameter.',
  )

  def overridden(self, model: ModelOptions) -> ModelOptions:
    """The options of a model, with the overrides of this evaluation.

    Raises:
      OptionError: The message lists all problems of the overrides.
    """
    return overridden(MODELS, model, self.model_overrides, 'model.')

  @required
  def measure(self, setting: Setting) -> Measure:
    """Returns the function from variables and a step to a row of metrics.

    The row has a number, or a flat list of numbers, by the name of each metric.
    Where two evaluations return equal functions, one measurement serves both.

    Raises:
      ValueError: The run lacks what the evaluation needs.
    """
    raise NotImplementedError

  def shrunk(self) -> Self:
    return dataclasses.replace(self, every_steps=2)


@dataclasses.dataclass(frozen=True)
class LossEvaluation(EvaluationOptions):
  """The kind 'loss': the loss of a split, and statistics of the routers."""

  every_steps: int = every_steps_option(500)
  num_batches: int = option(
    0, 'Number of batches, spread over the split; 0 takes all.', minimum=0
  )
  split: str = option(
    'validation',
    "Split whose loss is measured; 'train' shows how far a model overfits.",
    choices=SPLITS,
  )

  def measure(self, setting: Setting) -> Measure:
    rows = setting.dataset.splits[self.split]
    return Losses(setting.model, self.num_batches, rows, setting.put)

  def shrunk(self) -> Self:
    return dataclasses.replace(super().shrunk(), num_batches=1)


DEFAULT_EVALS = {
  'train_capacity': LossEvaluation(),
  'capacity_2': LossEvaluation(model_overrides=_ROOM_FOR_TWICE),
  'all_tokens': LossEvaluation(model_overrides=ROOM_FOR_ALL),
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One entry of `config.evals`, ready to run.

  Attributes:
    name: The name of the entry.
    every_steps: Its period in optimizer steps; at the end of the run it runs in
      any case, and with 0 only then.
    measure: Function from variables and a step to a row of metrics.
  """

  name: str
  every_steps: int
  measure: Measure

  def due(self, step: int) -> bool:
    """Whether `step` is a multiple of the period; never with a period of 0."""
    return self.every_steps > 0 and step % self.every_steps == 0


class Stopped(Exception):
  """A signal stopped an evaluation between two batches."""


def between_batches() -> None:
  """Raises `Stopped` if a signal stops the run.

  An evaluation calls this before each batch, in the thread in which it runs,
  and equally often in every process.
  """
  if _SHOULD_STOP.get()():
    raise Stopped


def evaluation_rows(
  evaluations: Sequence[Evaluation],
  variables: Variables,
  step: int,
  *,
  should_stop: Callable[[], bool] = lambda: False,
  showing: Callable[[str], Any] = contextlib.nullcontext,
) -> dict[str, Row]:
  """Runs evaluations; returns the row of metrics of each, by its name.

  Evaluations with equal functions are measured once.

  Args:
    evaluations: The evaluations.
    variables: The variables of the model.
    step: The number of optimizer steps taken.
    should_stop: Returns whether to stop; it is called before each batch.
    showing: Returns, from the name of an evaluation, the context in which it
      runs, such as one that shows the name.

  Raises:
    Stopped: `should_stop` returned True.
  """
  measured: list[tuple[Measure, Row]] = []
  rows: dict[str, Row] = {}
  token = _SHOULD_STOP.set(should_stop)
  try:
    for entry in evaluations:
      equal = (row for measure, row in measured if measure == entry.measure)
      row = next(equal, None)
      if row is None:
        with showing(entry.name):
          row = entry.measure(variables, step)
        measured.append((entry.measure, row))
      rows[entry.name] = row
  finally:
    _SHOULD_STOP.reset(token)
  return rows


@dataclasses.dataclass(frozen=True)
class Losses:
  """A function that measures the loss, and statistics of the routers.

  Instances with equal attributes are equal and give equal metrics, so one
  measurement serves all evaluations that have such instances.

  Attributes:
    model: The model that is evaluated.
    num_batches: Number of batches; 0 takes all rows of data.
    rows: The rows of data of the split.
    put: Moves batches of numpy arrays to the devices.
  """

  model: Model
  num_batches: int
  rows: Rows
  put: Placing

  def batches(self) -> Iterator[dict[str, jax.Array]]:
    """Yields batches of the rows of data to measure, moved to the devices."""
    batches = eval_batches(
      self.rows,
      batch_size=self.put.batch_size,
      num_batches=self.num_batches,
      share=self.put.rows,
    )
    return map(self.put.local, batches)

  def __call__(self, variables: Variables, step: int) -> Row:
    """The row of metrics: `loss`, in nats per token, and routers' statistics.

    These are `drop_rate` and, for each sparse layer, `layer_<i>/...`. `step` is
    not used: the row depends on the variables alone.
    """
    return summary.summarize(self.sums(variables), self.model.stacks.moes)

  def sums(
    self,
    variables: Variables,
    apply: Apply = plainly,
    record: Record = lambda number, batch, choices: None,
  ) -> summary.LossSums:
    """The sums of losses and statistics over all batches, as float64 numpy.

    Args:
      variables: The variables of the model.
      apply: Function from the model, its variables and its inputs to its result
        and the choices of experts, or None in place of the choices.
      record: Called for each batch with its index, the batch, and the choices
        of experts, or None where `apply` returns none.
    """
    compiled_step = compiled_eval_step(self.model, self.put, apply)

    def sums_of(numbered_batch):
      number, batch = numbered_batch
      between_batches()
      sums = compiled_step(variables, batch)
      record(number, batch, sums.choices)
      return sums._replace(choices=None)

    # Sums are added on the host in float64, as a split may have more tokens
    # than float32 can count.
    sums = map(sums_of, enumerate(self.batches()))
    return functools.reduce(summary.add, map(summary.host, behind(sums)))


def behind(results: Iterator[R]) -> Iterator[R]:
  """Yields results in order, each after the next two, if any, have been taken.

  Taking a result from `results` starts its computation, so the devices compute
  later results while the caller reads an earlier one.
  """
  pending = collections.deque[R]()
  for result in results:
    pending.append(result)
    if len(pending) > _IN_FLIGHT:
      yield pending.popleft()
  yield from pending


@functools.lru_cache(maxsize=16)
def compiled_eval_step(model: Model, put: Placing, apply: Apply = plainly):
  """Returns the compiled function (variables, batch) -> sums over the batch.

  The batch is one that `put` has moved. The sums are those of the losses and
  of the routers' statistics, with the choices of experts if `apply` returns
  them. `apply` applies the model, without noise and dropout. Equal arguments
  share the function.
  """

  model = model.with_deferred_logits()

  def eval_step(variables, batch):
    def of_slice(index, batch):
      (outputs, aux), choices = apply(model, variables, **model.inputs(batch))
      return loss_sums(model.loss(outputs, batch), batch, aux), choices

    sums, choices = over_slices(of_slice, batch, put.microbatches)
    return sums._replace(choices=choices)

  rest: Any = None  # the compiler decides
  sums = summary.LossSums(rest, rest, rest, rest, put.sharding)
  return jax.jit(eval_step, out_shardings=sums)


def make_evaluations(
  entries: Mapping[str, EvaluationOptions],
  options: ModelOptions,
  rules: Rules,
  run: Setting,
) -> list[Evaluation]:
  """All evaluations of a run, ready to run.

  Args:
    entries: The options of each evaluation, by name.
    options: The training model's options, with the sizes that the data decides.
    rules: The sharding table: the mesh axes that split each logical axis.
    run: The parts of the run, with the training model.

  Raises:
    OptionError: Parameters of some models differ from those of the training
      model, or the run lacks what some evaluations need; all are named.
  """
  evaluations, problems = [], []
  for name, entry in entries.items():
    model = entry.overridden(options).build(rules)
    if text := differing_parameters(run.model, model):
      problems.append(
        f'evals.{name}.model_overrides changes parameters ("saved" are those '
        f'of the model that trains, "wanted" those of the evaluation):\n{text}'
      )
      continue
    try:
      measure = entry.measure(dataclasses.replace(run, name=name, model=model))
      evaluations.append(Evaluation(name, entry.every_steps, measure))
    except InputError as error:
      problems.append(f'evals.{name}: {error}')
  if problems:
    raise OptionError(problems)
  return evaluations


def differing_parameters(model: Model, changed: Model) -> str:
  """Lines on the parameters whose shapes differ between two models.

  The lines call the parameters of `model` "saved" and those of `changed`
  "wanted". The text is '' if no shapes differ. Types of floating-point numbers
  may differ.
  """
  if changed == model:
    return ''
  trees = map(models.abstract_params, (model, changed))
  return manifest.difference(*map(manifest.describe, trees), cast=True)
