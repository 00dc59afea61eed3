"""Records a run's metrics, shows progress, keeps batches of non-finite steps.

The metrics of step n - 1 are read after step n was dispatched, so that reading
them never makes the device wait.

If the loss, the gradient or the new state of a step is not finite, the arrays
of its global batch are kept, by name, in `workdir/nonfinite/<step>.npz`.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.devices import fetch, is_first
from moe_jax.errors import ReportedError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.runs import finite, goodput, summary
from moe_jax.runs.checkpointer import Checkpointer, CheckpointError
from moe_jax.runs.metrics import FILE_NAME, MetricsWriter, Row, read_metrics
from moe_jax.runs.progress import Progress
from moe_jax.runs.summary import Batch, LossSums, StepMetrics, add

_NONFINITE = 'nonfinite'  # the folder of batches of steps that were not finite


class NonFiniteError(ReportedError, RuntimeError):
  """A step is not finite, and no further step may be skipped.

  The step's loss, its gradient or the state after it has a value that is not
  finite.
  """


@dataclasses.dataclass
class Recorder:
  """Averages the metrics of steps, writes them as rows and shows progress.

  Every process has a recorder with the same numbers, but only that of process 0
  writes and prints.

  Attributes:
    workdir: The folder of the run.
    total_steps: The number of steps of the whole run.
    log_every_steps: The number of steps between two rows.
    max_nonfinite_steps: The number of steps that may be skipped as not finite.
    batch_tokens: The number of tokens of a batch.
    moes: The options of each layer's mixture of experts, None for a dense one.
    state: The shapes of the train state.
    checkpoints: The run's checkpoints, which an error names.
    tell: Makes a text of an evaluation's row of metrics, if that has no loss.
    confirm: Raises ValueError if another job has taken the folder.
    trackers: Names of the trackers that get the rows, too.
    least_step_seconds: The seconds that a step would take at the peak speed of
      the devices; 0 where the peak is unknown.
    progress: The display of the run's progress.
  """

  workdir: pathlib.Path
  _: dataclasses.KW_ONLY
  total_steps: int
  log_every_steps: int
  max_nonfinite_steps: int
  batch_tokens: int
  moes: Sequence[MoeOptions | None]
  state: Any
  checkpoints: Checkpointer
  tell: Callable[[Row], str]
  confirm: Callable[[], None] = lambda: None
  trackers: Sequence[str] = ()
  least_step_seconds: float = 0.0

  def __post_init__(self):
    self._writer: MetricsWriter | None = None
    self.progress = Progress(self.total_steps)
    self._pending: tuple[int, StepMetrics, Batch] | None = None
    self._sums: LossSums | None = None
    self._steps = 0
    self._is_compiled = False
    self._busy_seconds = 0.0  # until the last row
    self._last_scalars: Row = {}  # of the step that was read last
    self._ended: concurrent.futures.Future[float] | None = None

  @contextlib.contextmanager
  def recording(
    self, start: int, due: Collection[str] = (), begun: float | None = None
  ) -> Iterator[None]:
    """Records the metrics of a run while the body runs.

    Args:
      start: The number of steps that are taken already; 0 where the run begins.
      due: Names of the evaluations after step `start` that are still to be
        made.
      begun: The time of `goodput.now` at which the process began with the run;
        None is now.
    """
    self._kept_steps = kept_steps(self.workdir)
    self._skipped = sum(n <= start for n in self._kept_steps)
    last = {}
    with contextlib.ExitStack() as stack:
      if is_first():
        self._writer = stack.enter_context(
          MetricsWriter(
            self.workdir,
            resume_step=start or None,
            due=due,
            trackers=self.trackers,
          )
        )
        rows = read_metrics(self.workdir / FILE_NAME)
        last = next((r for r in rows[::-1] if 'train/goodput' in r), {})
      self.progress = Progress(self.total_steps, start)
      stack.enter_context(self.progress)
      self._goodput = goodput.Goodput(last, begun or goodput.now())
      self._goodput.turn_to('compile')
      self._thread = concurrent.futures.ThreadPoolExecutor(1, 'end of step')
      # A step that waits for a process that is lost does not end.
      stack.callback(self._thread.shutdown, wait=False)
      yield

  def message(self, text: str) -> None:
    """Prints a line, above the bar of progress where there is one."""
    self.progress.message(text)

  def add(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
    """Stores the metrics of a step, and reads those of the step before it.

    If the loss, the gradient norm or the new state of the step before is not
    finite, its batch is kept in the workdir, and the averages leave that step
    out.

    Raises:
      NonFiniteError: More than `max_nonfinite_steps` steps were not finite.
    """
    self._ended = self._thread.submit(_time_of_end, metrics.loss)
    self._flush()
    self._pending = step, metrics, batch

  @contextlib.contextmanager
  def paused(self, cause: str) -> Iterator[None]:
    """Reads the last step's metrics, then counts the body's time for a cause.

    The body takes no step.

    Args:
      cause: The reason for the pause: 'evaluation' or 'checkpoint'.
    """
    self._flush()
    before = self._goodput.turn_to(cause)
    yield
    self._goodput.turn_to(before)

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time that the body waits for a batch while no step runs."""
    start, before = goodput.now(), self._goodput.turn_to('data')
    yield
    self._goodput.turn_to(before)
    if self._ended is not None:
      end = self._ended.result() if self._ended.done() else goodput.now()
      self._goodput.move(max(end - start, 0.0), 'data', before)

  def evaluated(self, step: int, results: dict[str, Row]) -> None:
    """Writes and prints the rows of metrics of evaluations, by their names."""
    losses = {}
    for name, row in results.items():
      self._write(step, {f'eval/{name}/{k}': v for k, v in row.items()})
      if 'loss' in row:
        losses[name] = row['loss']
      else:
        self.message(f'step {step}: evaluation {name}: {self.tell(row)}')
    if losses:
      text = '  '.join(f'{name} {loss:.4f}' for name, loss in losses.items())
      self.message(f'step {step}: evaluation, nats/token: {text}')

  def write_averages(self, step: int) -> None:
    """Writes the averages over the steps since the last row, if there are any.

    The row of metrics gets the step `step`.
    """
    if self._sums is None:
      return
    busy_seconds = self._goodput.busy_seconds
    row = {**summary.summarize(self._sums, self.moes), **self._last_scalars}
    if self._steps:
      seconds = max(busy_seconds - self._busy_seconds, 1e-9) / self._steps
      row['tokens_per_second'] = self.batch_tokens / seconds
      row['step_seconds'] = seconds
      if self.least_step_seconds:
        row['mfu'] = self.least_step_seconds / seconds
    row |= self._goodput.row()
    self._write(step, {f'train/{k}': v for k, v in row.items()})
    self.progress.update(step, row)
    self._sums, self._steps, self._busy_seconds = None, 0, busy_seconds

  def _flush(self) -> None:
    if self._pending is None:
      return
    (step, metrics, batch), self._pending = self._pending, None
    sums = summary.host(metrics.sums)
    loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
    flags, bad = np.asarray(metrics.finite), []
    if not flags.all():
      bad = finite.names(finite.without_opt_state(self.state), flags)
    if bad or not (math.isfinite(loss) and math.isfinite(grad_norm)):
      text = f'step {step}: loss={loss}, gradient norm={grad_norm}'
      if bad:
        text += f', not finite in the new state: {finite.listed(bad)}'
      self._skip(step, text, sums, batch)
    else:
      if step in self._kept_steps and is_first():  # now it is finite
        _batch_file(self.workdir, step).unlink(missing_ok=True)
      self._sums = sums if self._sums is None else add(self._sums, sums)
    if self._is_compiled:
      self._steps += 1
    else:
      self._is_compiled = True
      self._goodput.turn_to(goodput.STEPS)
      self._busy_seconds = self._goodput.busy_seconds
    due = step % self.log_every_steps == 0 or step == self.total_steps
    self._last_scalars = {
      'total_loss': loss,
      'grad_norm': grad_norm,
      'learning_rate': float(metrics.learning_rate),
    }
    if due:
      self.write_averages(step)

  def _skip(self, step: int, text: str, sums: LossSums, batch: Batch) -> None:
    """Keeps the batch of a step that is not finite; raises after too many.

    The file is written all or nothing; every process calls this.

    Args:
      step: The number of the step.
      text: What is not finite, for messages.
      sums: The sums of the step, as `summary.host` gives them, for the error.
      batch: The global batch of the step.

    Raises:
      NonFiniteError: No further step may be skipped.
      OSError: The file cannot be written.
    """
    path, arrays = _batch_file(self.workdir, step), fetch(dict(batch))
    if is_first():
      path.parent.mkdir(exist_ok=True)
      unfinished = path.with_suffix('.tmp')
      with unfinished.open('wb') as file:
        np.savez(file, **arrays)
      unfinished.replace(path)
    if self._skipped >= self.max_nonfinite_steps:
      raise NonFiniteError(self._describe(text, sums, path))
    self._skipped += 1
    self.message(
      f'{text}: left out, {self._skipped} of at most '
      f'{self.max_nonfinite_steps}; its batch is {path}'
    )

  def _write(self, step: int, row: Row) -> None:
    if self._writer is not None:
      self.confirm()
      self._writer.write(step, row)

  def _describe(self, text: str, sums: LossSums, path: pathlib.Path) -> str:
    lines = [text]
    for i in summary.sparse_layers(sums):
      layer = summary.layer_summary(sums, i, self.moes)
      lines.append(
        f'  layer {i}: router logit RMS {layer["router_logit_rms"]:.3g}, '
        f'entropy {layer["entropy"]:.3g}, drop rate {layer["drop_rate"]:.1%}, '
        f'load max/mean {layer["load_max_over_mean"]:.2f}'
      )
    with contextlib.suppress(CheckpointError):
      self.checkpoints.wait()
    newest = self.checkpoints.newest_good()
    newest_text = 'none' if newest is None else f'step {newest}'
    advice = 'begin anew' if newest is None else 'go on with --resume'
    lines.append(f'its batch is {path}')
    lines.append(
      f'last good checkpoint: {newest_text} in {self.workdir}; lower '
      f'optimizer.learning_rate or raise moe.z_weight, and {advice}'
    )
    return '\n'.join(lines)


def _time_of_end(array: Any) -> float:
  jax.block_until_ready(array)
  return goodput.now()


def kept_steps(workdir: pathlib.Path) -> set[int]:
  """The steps that were not finite, by their batches in the run's folder.

  Earlier processes of the run may have kept them.
  """
  numbers = [path.stem for path in (workdir / _NONFINITE).glob('*.npz')]
  return {int(n) for n in numbers if n.isdigit()}


def _batch_file(workdir: pathlib.Path, step: int) -> pathlib.Path:
  return workdir / _NONFINITE / f'{step}.npz'
