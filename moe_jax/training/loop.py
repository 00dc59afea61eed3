"""The training loop: step, metrics, checkpoint, evaluations, each when due.

The checkpoint of a step is written before the evaluations after that step, and
their results that decide on the best checkpoint and on early stopping are added
to its manifest later. So if a signal or a kill cuts an evaluation short, no
step is lost, and the evaluation is made when the run goes on.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.experimental import multihost_utils

from moe_jax.cli import print_line
from moe_jax.devices import is_first
from moe_jax.errors import InputError
from moe_jax.runs import goodput
from moe_jax.runs.ownership import owned
from moe_jax.runs.watchdog import Watchdog, watching
from moe_jax.runs.workdir import folder_of
from moe_jax.training.begin import (
  DUE,
  EXPERTS,
  NEXT_ROW,
  NUM_ROWS,
  Initial,
  begin,
)
from moe_jax.training.evaluate import Stopped, evaluation_rows
from moe_jax.training.run_options import RunOptions
from moe_jax.training.setup import Hook, Run, set_up
from moe_jax.training.step import TrainState


class Interrupted(KeyboardInterrupt):
  """Ctrl-C, or a notebook's stop button, stopped a run, which has saved."""


def train_and_evaluate(
  options: RunOptions,
  workdir: str | os.PathLike[str],
  *,
  hooks: Sequence[Hook] = (),
  resume: bool = False,
  devices: Sequence[jax.Device] | None = None,
  initial: Initial | None = None,
) -> TrainState:
  """Trains the model that the options describe, and evaluates it.

  If `workdir` has checkpoints of the same options, the run goes on from the
  newest; on SIGTERM it saves and returns, also within an evaluation. On Ctrl-C
  (in a notebook, when the cell is interrupted) it saves and raises
  `Interrupted`, unless the caller has a handler of its own; a second one stops
  at once. Several processes all call this with the same arguments: if one gets
  a signal, all save and return after the same step, and if one is lost, the
  others end (`runs/watchdog.py`). Only process 0 prints and writes, except for
  each process' part of the checkpoints.

  Args:
    options: The run's options; `moe_jax.run_config.read` makes them from a
      config.
    workdir: Folder for checkpoints, metrics and reports.
    hooks: Hooks that are called before the first step, after the last, and
      when the function returns or raises.
    resume: Whether to go on even where the workdir's options differ.
    devices: The devices of the mesh; None means all devices.
    initial: Gives the parameters for the section `init_from`; see
      `begin.begin`.

  Raises:
    ValueError: The options or the data are bad; `workdir` cannot be written,
      belongs to another run, or another job uses it or has taken it.
    CheckpointError: A checkpoint could not be written or read.
    NonFiniteError: The loss, the gradient or the new state is not finite;
      nothing is saved after it.
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
    watchdog.before_end = run.checkpoints.settle
    watchdog.mark('the restore')
    run, state, due = begin(run, initial)
    at = _Position(int(state.step), state, due)
    stack.enter_context(run.recorder.recording(at.step, due, begun))
    should_stop = stack.enter_context(catching_sigterm())
    for hook in hooks:
      watchdog.mark(f'the start of {type(hook).__name__}')
      stack.callback(hook.close)
      run = hook.start(run) or run

    with catching_interrupt() as interrupted:
      _train(run, hooks, at, watchdog, should_stop)
    run.checkpoints.wait()
    if ended := _has_ended(run, at):
      if run.options.early_stopping.patience and is_first():
        run.message(
          f'the best checkpoint by {run.options.checkpoint.best_name} is that '
          f'of step {run.checkpoints.best_step()}; moe_jax.generate --best and '
          'init_from.best read it'
        )
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
class _Position:
  """The step at which a run is, and what is left to do there.

  Attributes:
    step: The number of steps taken.
    state: The train state after these steps.
    due: Names of the evaluations of this state that are still to be made.
  """

  step: int
  state: TrainState
  due: list[str]


def _train(
  run: Run,
  hooks: Sequence[Hook],
  at: _Position,
  watchdog: Watchdog,
  should_stop: Callable[[], bool],
) -> None:
  """Takes the steps that are left, until the run ends or a signal stops it."""
  total, early, stop = run.options.total_steps, run.early_stopping, False
  if at.due or (early.ends_now and at.step < total):
    watchdog.mark(f'evaluations of step {at.step}')
    stop = _evaluate(run, hooks, at, should_stop)
  if not stop and _has_ended(run, at):
    run.message(
      f'ended early at step {at.step}: {early.describe()}; to go on, give '
      'more early_stopping.patience, or 0, and --resume'
      if early.ended
      else f'already at step {at.step}: nothing left to train'
    )
  batches, period = run.batches(at.step), run.options.checkpoint.every_steps
  while not (stop or _has_ended(run, at)):
    step = at.step + 1
    watchdog.mark(f'the data of step {step}')
    with run.recorder.waiting():
      batch = next(batches)
    watchdog.mark(f'step {step}')
    at.state, metrics = run.train_step(at.state, batch)
    at.step = step
    run.recorder.add(step, metrics, batch)
    stop, last = should_stop(), step == total
    at.due = [e.name for e in run.evaluations if e.due(step) or last]
    if stop or last or (period and step % period == 0):
      watchdog.mark(f'the checkpoint of step {step}')
      _save(run, hooks, at)
    if at.due and not stop:
      watchdog.mark(f'evaluations of step {step}')
      stop = _evaluate(run, hooks, at, should_stop)


def _has_ended(run: Run, at: _Position) -> bool:
  """Whether a run has ended, in full or early, with no evaluation due."""
  is_last = at.step == run.options.total_steps or run.early_stopping.ended
  return is_last and not at.due


def _evaluate(
  run: Run,
  hooks: Sequence[Hook],
  at: _Position,
  should_stop: Callable[[], bool],
) -> bool:
  """Runs the evaluations that are due; returns whether a signal stopped them.

  Metrics are recorded before early stopping judges them. If early stopping
  ends the run, the evaluations that are not due at this step are run here,
  too. A run that is resumed with less patience may end at once; then only
  those other evaluations are run.
  """
  early, measured, step = run.early_stopping, set[str](), at.step
  try:
    while True:
      with run.recorder.paused('evaluation'):
        rows = evaluation_rows(
          [e for e in run.evaluations if e.name in at.due],
          run.programs.variables(at.state),
          step,
          should_stop=should_stop,
          showing=functools.partial(run.recorder.evaluating, step),
        )
        run.recorder.evaluated(step, rows)
        for hook in hooks:
          hook.paused()
      measured |= rows.keys()
      early.add(step, rows)
      best = run.options.checkpoint.best_of(rows)
      at.due = []
      if early.ended:
        run.recorder.write_averages(step)
        others = (e.name for e in run.evaluations if not e.due(step))
        at.due = [name for name in others if name not in measured]
      is_saved = run.checkpoints.last_step == step
      if is_saved or early.is_best(step) or early.ended:
        _save(run, hooks, at, best)
      if not at.due:
        break
  except (Stopped, InputError) as error:
    if run.checkpoints.last_step != step:
      _save(run, hooks, at)
    if isinstance(error, Stopped):
      return True
    raise
  if early.ended:
    run.message(f'step {step}: ending early: {early.describe()}')
  return False


def _save(
  run: Run, hooks: Sequence[Hook], at: _Position, best: float | None = None
) -> None:
  """Saves a checkpoint, or updates the manifest of the step's checkpoint.

  Args:
    run: The run.
    hooks: The run's hooks.
    at: The step, the state and the evaluations that are still due.
    best: The number that decides which checkpoint is the best; None where it is
      not measured.
  """
  with run.recorder.paused('checkpoint'):
    run.recorder.confirm()
    for hook in hooks:
      hook.paused()
    is_new = run.checkpoints.save(
      at.step,
      at.state,
      extra={
        'data_digest': run.dataset.digest,
        NUM_ROWS: len(run.dataset.splits['train']),
        NEXT_ROW: run.row_offset + at.step * run.options.batch_size,
        EXPERTS: run.programs.trained.masks_digest,
        DUE: at.due,
        **run.early_stopping.extra,
      },
      metrics={} if best is None else {run.options.checkpoint.best_name: best},
    )
    if is_new:
      run.message(f'step {at.step}: saving a checkpoint')


# Processes agree by numbered calls where to stop: at the first number above
# all that any process has passed to JAX. The numbers start at 1, since JAX acts
# as if 0 had been passed; so they are not the steps, which start higher in a
# resumed run.
_CALLS = itertools.count(1)
_SAVING = 'moe_jax: stopping, and saving first; another Ctrl-C stops at once'


@contextlib.contextmanager
def catching_sigterm() -> Iterator[Callable[[], bool]]:
  """Catches SIGTERM; gives a function that returns whether to stop now.

  The function is called once after each step, and before each batch of an
  evaluation, until it returns True. With several processes JAX catches the
  signal, and all processes stop at the same call, which none of them had made
  when the first of them got the signal.
  """
  if jax.process_count() > 1:
    yield lambda: multihost_utils.reached_preemption_sync_point(next(_CALLS))
    return
  received = []
  try:
    handler = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
  except ValueError:  # not the main thread: signals are the caller's
    yield lambda: False
    return
  try:
    yield lambda: bool(received)
  finally:
    signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def catching_interrupt() -> Iterator[list[int]]:
  """Makes the first Ctrl-C a SIGTERM; gives the list of signals caught.

  The second Ctrl-C stops the cell of a notebook at once, and elsewhere the
  process. A caller's own handler stays, and so does that of a job that ignores
  Ctrl-C.
  """
  old_handler, received = signal.getsignal(signal.SIGINT), []

  def on_first_interrupt(number, _):
    received.append(number)
    # The prompt ps1 exists where Python is used interactively.
    next_handler = old_handler if hasattr(sys, 'ps1') else signal.SIG_DFL
    signal.signal(signal.SIGINT, next_handler)
    signal.raise_signal(signal.SIGTERM)
    # The signal may have come while this stream was written to.
    with contextlib.suppress(RuntimeError):
      print_line(_SAVING, sys.stderr)

  is_main_thread = threading.current_thread() is threading.main_thread()
  if old_handler is not signal.default_int_handler or not is_main_thread:
    yield received
    return
  signal.signal(signal.SIGINT, on_first_interrupt)
  try:
    yield received
  finally:
    signal.signal(signal.SIGINT, old_handler)
