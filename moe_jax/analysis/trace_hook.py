"""The hook that records the choices of a run, as its section `trace` says.

Not here: the options (`training/trace_options.py`), and how choices come from
the devices into files (`recording.py`).
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, cast

from moe_jax import sections
from moe_jax.analysis.recording import Recorder
from moe_jax.analysis.trace_header import make_header
from moe_jax.analysis.trace_records import Header
from moe_jax.models.recorded import Apply
from moe_jax.runs import summary
from moe_jax.runs.metrics import Row
from moe_jax.training.evaluate import Losses, Variables
from moe_jax.training.programs import Step
from moe_jax.training.setup import Hook, Run
from moe_jax.training.trace_options import TraceOptions

FOLDER = 'trace'


class Traces(Hook):
  """Records the choices of experts that the section `trace` names.

  It has to come after hooks that change or compile the step.
  """

  serves = 'trace'

  def __init__(self):
    self._recorder: Recorder | None = None

  def check(self, run: Run) -> None:
    """Checks that the choices can be recorded.

    Raises:
      ValueError: The workdir has the trace of another run.
    """
    if run.options.trace.is_on and run.model.sparse_layers:
      log = lambda text: run.message(text)  # noqa: E731  hooks change it later
      folder = run.workdir / FOLDER
      self._recorder = Recorder(folder, header_of(run), run.model, log)

  def start(self, run: Run) -> None:
    """Wraps the step and the evaluations that are recorded."""
    o = run.options.trace
    if self._recorder is None:
      if o.is_on:
        run.message(
          'trace: the model has no sparse layers; nothing is recorded'
        )
      return
    if o.every_steps:
      run.train_step = _RecordedStep(run.train_step, o, self._recorder)
    names = o.names(run.options.loss_evals)
    run.evaluations = [
      dataclasses.replace(
        evaluation,
        measure=RecordedLosses(
          evaluation.name,
          cast(Losses, evaluation.measure),
          o.recording,
          self._recorder,
        ),
      )
      if evaluation.name in names
      else evaluation
      for evaluation in run.evaluations
    ]
    run.message(
      f'trace: choices of experts are recorded in {run.workdir / FOLDER}'
    )

  def saving(self) -> None:
    """Writes all records before the checkpoint, so that no step is missing."""
    if self._recorder is not None:
      self._recorder.flush()

  def close(self) -> None:
    """Writes the records that are in no file yet."""
    if self._recorder is not None:
      self._recorder.close()


def header_of(run: Run) -> Header:
  """The header of a run's trace."""
  o = run.options
  return make_header(
    run.model,
    o.model,
    o.data,
    run.dataset.tokenizer,
    batch_size=o.batch_size,
    microbatches=o.microbatches,
    data_digest=run.dataset.digest,
    seed=o.seed,
    has_logits=o.trace.logits,
    dtype=o.trace.dtype,
    config=json.dumps(
      sections.section(run.given_options).to_dict(), sort_keys=True
    ),
  )


class _RecordedStep:
  """A step (state, batch) whose choices go to a recorder.

  The metrics that it returns are without the choices.
  """

  def __init__(self, step: Step, options: TraceOptions, recorder: Recorder):
    self._step, self._options, self._recorder = step, options, recorder
    self._num_steps: int | None = None

  def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
    if self._num_steps is None:  # reading `state.step` waits for the device
      self._num_steps = int(state.step)
      self._recorder.begin(self._num_steps)
    num_steps, self._num_steps = self._num_steps, self._num_steps + 1
    state, metrics = self._step(state, batch)
    sums = metrics.sums
    if self._options.has_step(num_steps + 1):
      self._recorder.add('train', num_steps, 0, batch, sums.choices)
    return state, metrics._replace(sums=sums._replace(choices=None))


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedLosses:
  """Measures losses, and records the choices of all batches.

  Attributes:
    name: The name of the evaluation.
    losses: The measurement.
    apply: Applies the model, and returns its choices.
    recorder: The recorder.
  """

  name: str
  losses: Losses
  apply: Apply
  recorder: Recorder

  def __call__(self, variables: Variables, step: int) -> Row:
    """The row that `losses` measures."""
    self.recorder.begin(step)
    record: Callable[..., None] = functools.partial(
      self.recorder.add, self.name, step
    )
    sums = self.losses.sums(variables, self.apply, record)
    return summary.summarize(sums, self.losses.model.moes)
