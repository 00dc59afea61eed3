"""From each step's metrics to rows, the progress display and the NaN check.

Metrics of step n - 1 are read after step n was dispatched, so that reading
them never makes the device wait.
"""

import contextlib
import math
import time

from moe_jax.training import summary
from moe_jax.training.checkpoint import CheckpointError
from moe_jax.training.evaluate import Row
from moe_jax.training.losses import LossSums, add
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.progress import Progress
from moe_jax.training.setup import Run
from moe_jax.training.step import StepMetrics


class NonFiniteError(RuntimeError):
  """The loss or the gradient is not finite any more."""


class Recorder:
  """A context manager; rows are averages since the row before."""

  def __init__(self, run: Run, start: int):
    """Opens the workdir's metrics at step `start`."""
    self._run = run
    self._start = start
    self._pending: tuple[int, StepMetrics] | None = None
    self._sums: LossSums | None = None
    self._steps = 0
    self._tokens = 0.0
    self._clock: float | None = None  # None until the first step is compiled
    self._eval_losses: dict[int, dict[str, float]] = {}

  def __enter__(self) -> 'Recorder':
    run = self._run
    self._stack = contextlib.ExitStack()
    resume_step = self._start or None
    self._writer = self._stack.enter_context(
      MetricsWriter(run.workdir, resume_step=resume_step)
    )
    self._progress = self._stack.enter_context(
      Progress(run.config.total_steps, self._start)
    )
    run.message = self._progress.message
    return self

  def __exit__(self, *exc) -> None:
    self._run.message = print
    self._stack.close()

  def add(self, step: int, metrics: StepMetrics) -> None:
    """Takes step's metrics, and reads those of the step before.

    Raises:
      NonFiniteError: The step before has a loss or gradient norm that is not
        finite.
    """
    self._flush()
    self._pending = step, metrics

  @contextlib.contextmanager
  def paused(self, step: int):
    """Reads `step`'s metrics now, and keeps what follows out of the speed."""
    self._flush()
    began = time.perf_counter()
    yield
    if self._clock is not None:
      self._clock += time.perf_counter() - began

  def evaluated(self, step: int, results: dict[str, Row]) -> None:
    """Writes and says what the evaluations found."""
    losses = {}
    for name, row in results.items():
      self._writer.write(
        step, {f'eval/{name}/{key}': value for key, value in row.items()}
      )
      if 'loss' in row:
        losses[name] = row['loss']
      else:
        said = ', '.join(f'{key} {value:.4g}' for key, value in row.items())
        self._run.message(f'step {step}: evaluation {name}: {said}')
    self._eval_losses = {step: losses}
    if losses:
      said = '  '.join(f'{name} {loss:.4f}' for name, loss in losses.items())
      self._run.message(f'step {step}: evaluation, nats/token: {said}')

  def best_metric(self, step: int) -> dict[str, float] | None:
    """The loss the best checkpoint is chosen by, if taken at this step."""
    name = self._run.config.checkpoint.best_eval
    losses = self._eval_losses.get(step, {})
    return {name: losses[name]} if name in losses else None

  def saved(self, step: int) -> None:
    """Says that a checkpoint is on its way."""
    self._run.message(f'step {step}: saving a checkpoint')

  def _flush(self) -> None:
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    sums = summary.host(metrics.sums)
    loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
      raise NonFiniteError(self._describe(step, loss, grad_norm, sums))
    self._sums = sums if self._sums is None else add(self._sums, sums)
    if self._clock is None:
      self._clock = time.perf_counter()
    else:
      self._steps += 1
      self._tokens += (
        self._run.config.batch_size * self._run.config.data.seq_len
      )
    total = self._run.config.total_steps
    if step % self._run.config.log_every_steps == 0 or step == total:
      self._row(step, loss, grad_norm, float(metrics.learning_rate))

  def _row(self, step, loss, grad_norm, learning_rate) -> None:
    now = time.perf_counter()
    seconds = max(now - self._clock, 1e-9)
    values = summary.summarize(self._sums)
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
    self._writer.write(step, {f'train/{k}': v for k, v in row.items()})
    self._progress.update(
      step,
      loss=values['loss'],
      tokens_per_second=speed,
      drop_rate=values.get('drop_rate'),
    )
    self._sums, self._steps, self._tokens, self._clock = None, 0, 0.0, now

  def _describe(self, step, loss, grad_norm, sums) -> str:
    lines = [f'step {step}: loss={loss}, gradient norm={grad_norm}']
    for i in summary.sparse_layers(sums):
      layer = summary.layer_summary(sums, i)
      lines.append(
        f'  layer {i}: router logit RMS {layer["router_logit_rms"]:.3g}, '
        f'entropy {layer["entropy"]:.3g}, drop rate {layer["drop_rate"]:.1%}, '
        f'load max/mean {layer["load_max_over_mean"]:.2f}'
      )
    with contextlib.suppress(CheckpointError):
      self._run.checkpoints.wait()
    newest = self._run.checkpoints.newest_good()
    good = 'none' if newest is None else f'step {newest}'
    lines.append(
      f'last good checkpoint: {good} in {self._run.workdir}; lower '
      'optimizer.learning_rate or raise moe.z_weight, and go on with --resume'
    )
    return '\n'.join(lines)
