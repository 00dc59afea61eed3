"""The training loop: step, metrics, checkpoint, evaluations, each when due.

The checkpoint of a step is written before the evaluations after that step, and
their results that decide on the best checkpoint and on early stopping are added
to its manifest later. So if a signal or a kill cuts an evaluation short, no
step is lost, and the evaluation is made when the run goes on.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import jax

from moe_jax.errors import InputError
from moe_jax.runs import goodput
from moe_jax.runs.ownership import owned
from moe_jax.runs.signals import catching_interrupt, catching_sigterm
from moe_jax.runs.watchdog import Watchdog, watching
from moe_jax.runs.workdir import folder_of
from moe_jax.training.evaluate import Stopped, evaluation_rows
from moe_jax.training.run_options import RunOptions
from moe_jax.training.setup import DUE, Hook, Initial, Run, begin, set_up
from moe_jax.training.step import TrainState


class Interrupted(KeyboardInterrupt):
  """Ctrl-C, or a notebook's stop button, stopped a run that has been saved."""


def train_and_evaluate(
  options: RunOptions,
  workdir: str | os.PathLike[str],
  *,
  hooks: Sequence[Hook] = (),
  resume: bool = False,
  devices: Sequence[jax.Device] | None = None,
  initial: Initial | None = None,
) -> TrainState:
  """Trains the model that the options describe; returns the last state.

  Evaluations are made when they are due.

  If `workdir` has checkpoints of the same options, the run goes on from the
  newest; on SIGTERM it saves and returns, also within an evaluation. On Ctrl-C
  (in a notebook, when the cell is interrupted) it saves and raises
  `Interrupted`, unless the caller has a handler of its own; a second Ctrl-C
  stops it at once. Several processes all call this with the same arguments: if
  one gets a signal, all save and return after the same step, and if one is
  lost, the others end (`runs/watchdog.py`). Only process 0 prints and writes,
  except for each process' part of the checkpoints.

  Args:
    options: The run's options; `moe_jax.run_config.read` makes them from a
      config.
    workdir: Folder for checkpoints, metrics and reports.
    hooks: Hooks that are called before the first step, after the last, and
      when the function returns or raises.
    resume: Whether to go on even where the workdir's options differ.
    devices: The devices of the mesh; None means all devices.
    initial: Function from a new run to its first variables and a line about
      them, such as `finetuning.initial`, which reads the run that `init_from`
      names; None draws parameters from the seed.

  Raises:
    ValueError: The options or the data are bad; `workdir` cannot be written,
      belongs to another run, or another job uses it or has taken it.
    CheckpointError: A checkpoint could not be written or read.
    NonFiniteError: The loss, the gradient or the new state was not finite in
      more than `max_nonfinite_steps` steps; nothing is saved after them.
    Interrupted: Ctrl-C stopped the run before its end; it has saved.
  """
  if unserved := set(options.for_hooks) - {hook.serves for hook in hooks}:
    raise InputError(
      f'the sections {sorted(unserved)} of the config have no effect without a '
      'hook that serves them; give it to hooks, as `moe_jax.main` does'
    )
  begun, folder = goodput.now(), folder_of(workdir)
  folders = [folder, *filter(None, [options.checkpoint.directory])]
  with (
    owned(folders) as confirm,
    watching(options.distributed, folder) as watchdog,
    contextlib.ExitStack() as stack,
  ):
    watchdog.mark('the set-up')
    run = set_up(
      options, workdir, resume=resume, devices=devices, confirm=confirm
    )
    for note in run.notes:
      run.message(note)
    for hook in hooks:
      hook.check(run)

    stack.enter_context(run.checkpoints)
    watchdog.mark('the restore')
    run, state, due = begin(run, initial)
    at = _Loop(run, hooks, watchdog, int(state.step), state, due)
    stack.enter_context(run.recorder.recording(at.step, due, begun))
    at.should_stop = stack.enter_context(catching_sigterm())
    for hook in hooks:
      watchdog.mark(f'the start of {type(hook).__name__}')
      stack.callback(hook.close)
      at.run = run = hook.start(run) or run

    with catching_interrupt() as interrupted:
      _train(at)
    run.checkpoints.wait()
    if ended := _has_ended(at):
      for hook in hooks:
        watchdog.mark(f'the end of {type(hook).__name__}')
        hook.end(run, at.state)
    elif not interrupted:
      reason = f'stopped by a signal at step {at.step}'
      run.message(f'{reason}; saved, will go on here')
    if at.due:
      names = ', '.join(at.due)
      run.message(f'still to be evaluated, when the run goes on: {names}')
  if interrupted and not ended:
    raise Interrupted(
      f'interrupted at step {at.step} and saved: the same command, or call, '
      f'goes on from there in {run.workdir}'
    )
  return at.state


@dataclasses.dataclass
class _Loop:
  """A run in its training loop, with its state after the last step taken.

  Attributes:
    run: The run.
    hooks: The hooks of the run.
    watchdog: Watches for a process that is stuck or lost.
    step: The number of steps taken.
    state: The train state after these steps.
    due: Names of the evaluations of this state that are still to be made.
    should_stop: Returns whether a signal stops the run.
  """

  run: Run
  hooks: Sequence[Hook]
  watchdog: Watchdog
  step: int
  state: TrainState
  due: list[str]
  should_stop: Callable[[], bool] = lambda: False


def _train(at: _Loop) -> None:
  """Takes the steps that are left, until the run ends or a signal stops it."""
  run, watchdog, stop = at.run, at.watchdog, False
  total, early = run.options.total_steps, run.early_stopping
  if at.due or (early.ended and not early.had_ended and at.step < total):
    stop = _evaluate(at)
  if not stop and _has_ended(at):
    run.message(
      f'ended early at step {at.step}: {early.describe()}; to go on, give '
      'more early_stopping.patience, or 0, and --resume'
      if early.ended
      else f'already at step {at.step}: nothing left to train'
    )
  batches, period = run.batches(at.step), run.options.checkpoint.every_steps
  while not (stop or _has_ended(at)):
    step = at.step + 1
    watchdog.mark(f'the data of step {step}')
    with run.recorder.waiting():
      batch = next(batches)
    watchdog.mark(f'step {step}')
    at.state, metrics = run.train_step(at.state, batch)
    at.step = step
    run.recorder.add(step, metrics, batch)
    stop, last = at.should_stop(), step == total
    at.due = [e.name for e in run.evaluations if e.due(step) or last]
    if stop or last or (period and step % period == 0):
      watchdog.mark(f'the checkpoint of step {step}')
      _save(at)
    if at.due and not stop:
      stop = _evaluate(at)


def _has_ended(at: _Loop) -> bool:
  """Whether a run has ended, in full or early, with no evaluation due."""
  is_last = at.step == at.run.options.total_steps or at.run.early_stopping.ended
  return is_last and not at.due


def _evaluate(at: _Loop) -> bool:
  """Runs the evaluations that are due; returns whether a signal stopped them.

  Metrics are recorded before early stopping judges them. If early stopping
  ends the run, the evaluations that are not due at this step are run here,
  too. A run that is resumed with less patience may end at once; then only
  those other evaluations are run. Where a signal or an `InputError` of an
  evaluation cuts this short, the step is saved first if it is not yet.
  """
  run, measured, step = at.run, set[str](), at.step
  early = run.early_stopping
  at.watchdog.mark(f'evaluations of step {step}')
  try:
    while True:
      with run.recorder.paused('evaluation'):
        rows = evaluation_rows(
          [e for e in run.evaluations if e.name in at.due],
          run.programs.variables(at.state),
          step,
          should_stop=at.should_stop,
          showing=functools.partial(run.recorder.progress.evaluating, step),
        )
        run.recorder.evaluated(step, rows)
        for hook in at.hooks:
          hook.paused()
      measured |= rows.keys()
      best = run.options.checkpoint.best_of(rows)
      early.add(step, best)
      at.due = []
      if early.ended:
        run.recorder.write_averages(step)
        others = (e.name for e in run.evaluations if not e.due(step))
        at.due = [name for name in others if name not in measured]
      is_saved = run.checkpoints.last_step == step
      if is_saved or early.is_best(step) or early.ended:
        _save(at, best)
      if not at.due:
        break
  except (Stopped, InputError) as error:
    if run.checkpoints.last_step != step:
      _save(at)
    if isinstance(error, Stopped):
      return True
    raise
  if early.ended:
    run.message(f'step {step}: ending early: {early.describe()}')
  return False


def _save(at: _Loop, best: float | None = None) -> None:
  """Saves a checkpoint; if the step has one, only its manifest is updated.

  Args:
    at: The run, and the step at which it is.
    best: The number that decides which checkpoint is the best; None where it is
      not measured.
  """
  run = at.run
  with run.recorder.paused('checkpoint'):
    run.recorder.confirm()
    for hook in at.hooks:
      hook.paused()
    is_new = run.checkpoints.save(
      at.step,
      at.state,
      extra=run.extra(at.step) | {DUE: at.due},
      metrics={} if best is None else {run.options.checkpoint.best_name: best},
    )
    if is_new:
      run.message(f'step {at.step}: saving a checkpoint')
