"""Recording of training metrics: averages, progress, and steps not finite.

Metrics of step n - 1 are read after step n was dispatched, so that reading
them never makes the device wait.
"""

import contextlib
import math
import pathlib
import time
from typing import Any, cast

import numpy as np

from moe_jax.devices import is_first
from moe_jax.errors import ReportedError
from moe_jax.runs import finite, summary
from moe_jax.runs.checkpointer import CheckpointError
from moe_jax.runs.metrics import MetricsWriter, Row
from moe_jax.runs.progress import Progress
from moe_jax.runs.summary import Batch, LossSums, StepMetrics, add


class NonFiniteError(ReportedError, RuntimeError):
  """A step is not finite, and may not be skipped.

  Its loss, its gradient or the state after it has a value that is not finite.
  """


class Recorder:
  """Averages the metrics of steps, writes them as rows and shows progress.

  It is a context manager. Every process has one, with the same numbers, but
  only that of process 0 writes.
  """

  def __init__(self, run: Any, start: int):
    """Prepares for a run that begins, or goes on, after `start` steps.

    Args:
      run: The run, a `moe_jax.training.setup.Run`, whose `message` is that of
        the display of progress until the end.
      start: The number of steps.
    """
    self._run = run
    self._start = start
    self._pending: tuple[int, StepMetrics, Batch] | None = None
    self._kept_steps = finite.kept_steps(run.workdir)
    self._skipped = sum(n <= start for n in self._kept_steps)
    self._sums: LossSums | None = None
    self._steps = 0
    self._tokens = 0.0
    self._clock: float | None = None  # None until the first step is compiled
    # The loss, gradient norm and learning rate of the step read last.
    self._last_scalars: tuple[float, float, float] | None = None

  def __enter__(self) -> 'Recorder':
    run = self._run
    self._stack = contextlib.ExitStack()
    self._message = run.message
    self._writer = self._progress = None
    if is_first():
      resume_step = self._start or None
      self._writer = self._stack.enter_context(
        MetricsWriter(run.workdir, resume_step=resume_step, due=run.due)
      )
      self._progress = self._stack.enter_context(
        Progress(run.options.total_steps, self._start)
      )
      run.message = self._progress.message
    return self

  def __exit__(self, *exc) -> None:
    self._run.message = self._message
    self._stack.close()

  def add(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
    """Stores the metrics of a step, and reads those of the step before it.

    If the loss, the gradient norm or the new state of the step before is not
    finite, its batch is kept in the workdir, and it is left out of the
    averages.

    Raises:
      NonFiniteError: More than `options.max_nonfinite_steps` steps were not
        finite.
    """
    self._flush()
    self._pending = step, metrics, batch

  @contextlib.contextmanager
  def paused(self, step: int):
    """Reads the metrics of `step`; the body's time does not count as training.

    Args:
      step: The last step that was added.
    """
    self._flush()
    start = time.perf_counter()
    yield
    if self._clock is not None:
      self._clock += time.perf_counter() - start

  def evaluating(
    self, step: int, name: str
  ) -> contextlib.AbstractContextManager:
    """Shows the name of an evaluation while the body runs."""
    if self._progress is None:
      return contextlib.nullcontext()
    return self._progress.evaluating(step, name)

  def evaluated(self, step: int, results: dict[str, Row]) -> None:
    """Writes and prints the rows of evaluations, given by name."""
    losses = {}
    for name, row in results.items():
      self._write(
        step, {f'eval/{name}/{key}': value for key, value in row.items()}
      )
      if 'loss' in row:
        losses[name] = row['loss']
      else:
        text = self._run.dataset.tell(row)
        self._run.message(f'step {step}: evaluation {name}: {text}')
    if losses:
      text = '  '.join(f'{name} {loss:.4f}' for name, loss in losses.items())
      self._run.message(f'step {step}: evaluation, nats/token: {text}')

  def ended(self, step: int) -> None:
    """Writes the averages since the last row, after the run's last step."""
    if self._sums is not None and self._last_scalars is not None:
      self._write_averages(step, *self._last_scalars)

  def saved(self, step: int) -> None:
    """Prints that the checkpoint of `step` is being saved."""
    self._run.message(f'step {step}: saving a checkpoint')

  def _flush(self) -> None:
    if self._pending is None:
      return
    (step, metrics, batch), self._pending = self._pending, None
    sums = summary.host(metrics.sums)
    loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
    state = self._run.programs.abstract_state
    flags = np.asarray(metrics.finite)
    bad = []
    if not flags.all():
      bad = finite.names(finite.without_opt_state(state), flags)
    if bad or not (math.isfinite(loss) and math.isfinite(grad_norm)):
      text = f'step {step}: loss={loss}, gradient norm={grad_norm}'
      if bad:
        text += f', not finite in the new state: {finite.listed(bad)}'
      self._skip(step, text, sums, batch)
    else:
      if step in self._kept_steps:
        finite.forget_batch(self._run.workdir, step)
      self._sums = sums if self._sums is None else add(self._sums, sums)
    if self._clock is None:
      self._clock = time.perf_counter()
    else:
      self._steps += 1
      lengths = self._run.options.data
      row_tokens = lengths.seq_len + lengths.target_len
      self._tokens += self._run.options.batch_size * row_tokens
    total = self._run.options.total_steps
    due = step % self._run.options.log_every_steps == 0 or step == total
    self._last_scalars = loss, grad_norm, float(metrics.learning_rate)
    if due and self._sums is not None:
      self._write_averages(step, *self._last_scalars)

  def _skip(self, step: int, text: str, sums: LossSums, batch: Batch) -> None:
    """Keeps the batch of a step that is not finite; raises if too many are."""
    path = finite.keep_batch(self._run.workdir, step, batch)
    max_skipped = self._run.options.max_nonfinite_steps
    if self._skipped >= max_skipped:
      raise NonFiniteError(self._describe(text, sums, path))
    self._skipped += 1
    self._run.message(
      f'{text}: left out, {self._skipped} of at most {max_skipped}; its batch '
      f'is {path}'
    )

  def _write_averages(self, step, loss, grad_norm, learning_rate) -> None:
    now = time.perf_counter()
    seconds = max(now - cast(float, self._clock), 1e-9)
    sums = cast(LossSums, self._sums)
    values = summary.summarize(sums, self._run.model.moes)
    sparse = bool(self._run.model.sparse_layers)
    speed = self._tokens / seconds
    row = {
      **values,
      'total_loss': loss,
      'grad_norm': grad_norm,
      'learning_rate': learning_rate,
    }
    if self._steps:
      row['tokens_per_second'] = speed
      row['step_seconds'] = seconds / self._steps
    self._write(step, {f'train/{k}': v for k, v in row.items()})
    if self._progress is not None:
      self._progress.update(
        step,
        loss=values['loss'],
        tokens_per_second=speed if self._steps else None,
        drop_rate=values.get('drop_rate') if sparse else None,
        step_seconds=row.get('step_seconds'),
      )
    self._sums, self._steps, self._tokens, self._clock = None, 0, 0.0, now

  def _write(self, step: int, row: Row) -> None:
    if self._writer is not None:
      self._run.confirm()
      self._writer.write(step, row)

  def _describe(self, text: str, sums: LossSums, path: pathlib.Path) -> str:
    lines = [text]
    for i in summary.sparse_layers(sums):
      layer = summary.layer_summary(sums, i, self._run.model.moes)
      lines.append(
        f'  layer {i}: router logit RMS {layer["router_logit_rms"]:.3g}, '
        f'entropy {layer["entropy"]:.3g}, drop rate {layer["drop_rate"]:.1%}, '
        f'load max/mean {layer["load_max_over_mean"]:.2f}'
      )
    with contextlib.suppress(CheckpointError):
      self._run.checkpoints.wait()
    newest = self._run.checkpoints.newest_good()
    newest_text = 'none' if newest is None else f'step {newest}'
    advice = 'begin anew' if newest is None else 'go on with --resume'
    lines.append(f'its batch is {path}')
    lines.append(
      f'last good checkpoint: {newest_text} in {self._run.workdir}; lower '
      f'optimizer.learning_rate or raise moe.z_weight, and {advice}'
    )
    return '\n'.join(lines)
