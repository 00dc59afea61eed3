"""Runs whose training steps make the choices of another run's trace.

    config.model.moe.replay = 'runs/tiny/trace'

The hook `Replaying` gives each training step the record of the same step. It
also gives steps that are recorded the same arrays, which then leave all choices
to the routers: a recorded run and a replayed one execute the same program, and
are equal to the last bit. Not here: a single batch, and whether a trace fits a
run (`replay.py`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import partitioning
from moe_jax.analysis import replay, traces
from moe_jax.analysis.trace_hook import header_of
from moe_jax.analysis.traces import Record, Trace
from moe_jax.errors import InputError
from moe_jax.training.setup import Hook, Run
from moe_jax.training_types import StepMetrics


class Replaying(Hook):
  """Imposes the records of `moe.replay` on the training steps of a run."""

  serves = 'model.moe.replay'

  def __init__(self):
    self._trace: Trace | None = None
    self._source: OpenChoices | RecordedChoices | None = None

  def check(self, run: Run) -> None:
    """Reads the trace.

    Raises:
      ValueError: There is none, it is damaged, or it does not fit the run.
    """
    if folder := run.options.model.replay:
      self._trace = traces.read(folder)
      steps = run.options.total_steps
      replay.check(
        self._trace, header_of(run), steps, f'model.moe.replay={folder!r}'
      )

  def start(self, run: Run) -> None:
    """Wraps the step."""
    if self._trace is not None:
      run.message(
        f'{run.options.model.replay}: its choices of experts are replayed in '
        'training; evaluations choose by themselves'
      )
      self._source = RecordedChoices(run, self._trace)
    elif _is_recorded(run):
      self._source = OpenChoices(run)
    else:
      return
    step = ReplayedStep(run.programs.train_step, self._source)
    run.programs = dataclasses.replace(run.programs, train_step=step)
    run.train_step = step

  def saving(self) -> None:
    """Checks that no step of other tokens is saved."""
    if self._source is not None:
      self._source.settle()

  def end(self, run: Run, state: Any) -> None:
    """Checks that the last step was of the recorded tokens, too."""
    if self._source is not None:
      self._source.settle()


def _is_recorded(run: Run) -> bool:
  """Whether steps are recorded that could be replayed as they are.

  A teacher would read the arrays of the batch, too, and forced choices cannot
  be left to the routers.
  """
  moes = [moe for moe in run.model.moes if moe is not None]
  return (
    bool(moes)
    and run.options.trace.every_steps > 0
    and not run.model.forced_balance
    and 'distill' not in run.options.for_hooks
    and all(moe.router.replays(moe.sizes) is None for moe in moes)
  )


class OpenChoices:
  """Arrays of choices that leave all of them to the routers of a run."""

  def __init__(self, run: Run):
    shapes = run.options.batch_shapes(run.model)
    self._arrays = run.programs.put(replay.no_choices(run.model, shapes))

  def next(
    self, state: Any, batch: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """The batch with the arrays that leave the choices to routers."""
    del state
    return {**batch, **self._arrays}

  def shapes(self, batch: dict[str, Any]) -> dict[str, Any]:
    """The shapes of `batch` with those of the arrays."""
    return {**batch, **_shapes(self._arrays)}

  def loop_metrics(self, metrics: StepMetrics) -> StepMetrics:
    """The metrics that the loop gets, which are all of them."""
    return metrics

  def settle(self) -> None:
    """Does nothing, as routers may choose for any batch."""


class RecordedChoices:
  """The recorded choices for the batches of a run, step by step.

  Whether a batch has the tokens of its record is checked on devices: before
  the first step, and for each later one when the next begins, so that nothing
  waits for a step that runs.
  """

  def __init__(self, run: Run, trace: Trace):
    self._run, self._trace = run, trace
    self._open = OpenChoices(run)
    self._records: Iterator[list[Record]] | None = None
    self._unsettled: tuple[int, jax.Array] | None = None
    replicated = partitioning.sharding(run.mesh, run.options.sharding.rules, ())
    self._equal = jax.jit(_equal, out_shardings=replicated)

  def next(
    self, state: Any, batch: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """The batch of the next step with its recorded choices.

    Raises:
      ValueError: The record is of another batch, or its file is damaged.
    """
    is_first = self._records is None
    if self._records is None:
      self._records = _by_step(self._trace, int(state.step))
    records = next(self._records)
    self.settle()
    put = self._run.programs.put
    arrays, record_ids = (
      put.local({name: value[put.rows] for name, value in values.items()})
      for values in (
        replay.arrays(self._run.model, records),
        replay.ids(records),
      )
    )
    batch_ids = {name: batch[name] for name in record_ids}
    self._unsettled = records[0].step, self._equal(batch_ids, record_ids)
    if is_first:
      self.settle()
    return {**batch, **arrays}

  def loop_metrics(self, metrics: StepMetrics) -> StepMetrics:
    """The metrics without choices, unless the run is recorded, too."""
    if self._run.options.trace.every_steps:
      return metrics
    return metrics._replace(sums=metrics.sums._replace(choices=None))

  def settle(self) -> None:
    """Raises ValueError if the last batch was another than the recorded one."""
    if self._unsettled is None:
      return
    (step, equal), self._unsettled = self._unsettled, None
    if not bool(equal):
      raise InputError(
        f'model.moe.replay={self._run.options.model.replay!r}: the batch after '
        f'{step} steps is another one there; the options of the data differ'
      )

  def shapes(self, batch: dict[str, Any]) -> dict[str, Any]:
    """The shapes of `batch` with those of recorded choices."""
    return self._open.shapes(batch)


class ReplayedStep:
  """A step (state, batch) whose batches get arrays of choices.

  Attributes:
    stage: The step that takes them in its batch, or a stage of its compilation.
    source: The source of the arrays.
  """

  def __init__(self, stage: Any, source: OpenChoices | RecordedChoices):
    self.stage, self.source = stage, source

  def __call__(self, state: Any, batch: dict[str, jax.Array]) -> Any:
    """The new state and the metrics; see `training.step.train_step`."""
    state, metrics = self.stage(state, self.source.next(state, batch))
    return state, self.source.loop_metrics(metrics)

  def lower(self, state: Any, batch: dict[str, Any]) -> 'ReplayedStep':
    """See `jax.stages.Wrapped.lower`."""
    lowered = self.stage.lower(state, self.source.shapes(batch))
    return ReplayedStep(lowered, self.source)

  def compile(self) -> 'ReplayedStep':
    """See `jax.stages.Lowered.compile`."""
    return ReplayedStep(self.stage.compile(), self.source)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.stage, name)


def _shapes(arrays: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for name, x in arrays.items()
  }


def _equal(
  in_batch: dict[str, jax.Array], in_record: dict[str, jax.Array]
) -> jax.Array:
  equal = [jnp.all(in_batch[name] == in_record[name]) for name in in_batch]
  return functools.reduce(jnp.logical_and, equal)


def _by_step(trace: Trace, start: int) -> Iterator[list[Record]]:
  """The records of each training step from `start` on, in order."""
  records = trace.records(replay.TRAIN, range(start, max(trace.steps) + 1))
  for _, step_records in itertools.groupby(records, lambda record: record.step):
    yield list(step_records)
