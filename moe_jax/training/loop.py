"""The loop: step, metrics, evaluations, checkpoint, each when it is due.

All that it drives is built in `setup.py`. Not here: samples, plots and
reports, which are hooks that `moe_jax.main` and experiments wire in.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence

import jax
import ml_collections

from moe_jax.training.evaluate import Kind, measured
from moe_jax.training.recorder import Recorder
from moe_jax.training.setup import Hook, Run, begin, set_up
from moe_jax.training.step import TrainState


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  hooks: Sequence[Hook] = (),
  resume: bool = False,
  devices: Sequence[jax.Device] | None = None,
  kinds: Mapping[str, Kind] | None = None,
) -> TrainState:
  """Trains what `config` describes, from where `workdir` stands.

  A workdir of the same config is gone on with; SIGTERM saves and returns.

  Args:
    config: A config as the files in `configs/` return it.
    workdir: Where checkpoints, metrics and reports go.
    hooks: Called at the start, and at the end once no step is left.
    resume: Goes on even where the workdir's config differs.
    devices: Of the mesh; None is all there are.
    kinds: Of evaluations, by name, beside 'loss'.

  Raises:
    ValueError: A bad config, bad data, or another run's workdir.
    CheckpointError: A checkpoint could not be written or read.
    NonFiniteError: The loss is not finite; nothing is saved after it.
  """
  run = set_up(config, workdir, resume=resume, devices=devices, kinds=kinds)
  with contextlib.ExitStack() as stack:
    stack.enter_context(run.checkpoints)
    state = begin(run)
    start = int(state.step)
    recorder = stack.enter_context(Recorder(run, start))
    stop = stack.enter_context(_sigterm())
    for hook in hooks:
      hook.start(run)
    for step, batch in zip(
      range(start + 1, run.config.total_steps + 1),
      run.batches(start),
      strict=False,
    ):
      state, metrics = run.train_step(state, batch)
      recorder.add(step, metrics)
      last = step == run.config.total_steps
      if last or not stop:  # who sends SIGTERM does not wait
        _evaluate(run, recorder, step, state, last)
      _save(run, recorder, step, state, last or bool(stop))
      if stop:
        break
    run.checkpoints.wait()
    if int(state.step) < run.config.total_steps:
      run.message(f'stopped by SIGTERM at step {step}; saved, will go on here')
      return state
    if start == run.config.total_steps:
      run.message(f'already at step {start}: nothing left to train')
    for hook in hooks:
      hook.end(run, state)
  return state


def _evaluate(run: Run, recorder: Recorder, step, state, last: bool) -> None:
  due = [e for e in run.evaluations if e.due(step) or last]
  if due:
    with recorder.paused(step):
      recorder.evaluated(step, measured(due, state.params, step))


def _save(run: Run, recorder: Recorder, step, state, must: bool) -> None:
  period = run.config.checkpoint.every_steps
  if must or (period and step % period == 0):
    with recorder.paused(step):
      run.checkpoints.save(
        step,
        state,
        extra={'data_digest': run.dataset.digest},
        metrics=recorder.best_metric(step),
      )
      recorder.saved(step)


@contextlib.contextmanager
def _sigterm() -> Iterator[list]:
  """A list that fills when SIGTERM arrives, in place of dying of it."""
  received = []
  try:
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
  except ValueError:  # not the main thread: signals are the caller's
    yield received
    return
  try:
    yield received
  finally:
    signal.signal(signal.SIGTERM, before)
