"""The training loop: step, metrics, checkpoint, evaluations, each when due.

The checkpoint of a step is written before the evaluations after that step, and
what they decide is added to its manifest. So an evaluation that a signal or a
kill cuts short costs no step, and is made up where the run goes on.
"""

import contextlib
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
from moe_jax.runs.metrics import Row
from moe_jax.runs.ownership import owned
from moe_jax.runs.recorder import Recorder
from moe_jax.runs.watchdog import Alone, Watchdog, watching
from moe_jax.runs.workdir import folder_of
from moe_jax.training.begin import DUE, EXPERTS, NEXT_ROW, Initial, begin
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
  at once. Several processes all call
  this with the same arguments: if one gets a signal, all save and return after
  the same step, and if one is lost, the others end (`runs/watchdog.py`). Only
  process 0 prints and writes, except for each process' part of the checkpoints.

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
  _check_served(options, hooks)
  with (
    watching(options.distributed) as watchdog,
    owned(_folders(options, workdir)) as ownership,
  ):
    watchdog.mark('the set-up')
    run = set_up(options, workdir, resume=resume, devices=devices)
    run.hooks, run.confirm = hooks, ownership.confirm
    for note in run.notes:
      run.message(note)
    for hook in hooks:
      hook.check(run)
    state, was_interrupted = _run(run, watchdog, initial)
  if was_interrupted:
    raise Interrupted(
      f'interrupted at step {int(state.step)} and saved: the same command, or '
      f'call, goes on from there in {run.workdir}'
    )
  return state


def _check_served(options: RunOptions, hooks: Sequence[Hook]) -> None:
  """Raises ValueError for a section that needs a hook which is not there."""
  if unserved := set(options.for_hooks) - {hook.serves for hook in hooks}:
    raise InputError(
      f'the sections {sorted(unserved)} of the config have no effect without a '
      'hook that serves them; give it to hooks, as `moe_jax.main` does'
    )


def _folders(
  options: RunOptions, workdir: str | os.PathLike[str]
) -> Iterator[str | os.PathLike[str]]:
  """The folders that this process owns: those of the job, in process 0."""
  if is_first():
    yield folder_of(workdir)
    if options.checkpoint.directory:
      yield options.checkpoint.directory


def _run(
  run: Run, watchdog: Alone | Watchdog, initial: Initial | None
) -> tuple[TrainState, bool]:
  """The last state, and whether Ctrl-C stopped the run before its end."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(run.checkpoints)
    watchdog.before_end = run.checkpoints.settle
    watchdog.mark('the restore')
    state = begin(run, initial)
    recorder = stack.enter_context(Recorder(run, int(state.step)))
    run.should_stop = stack.enter_context(catching_sigterm())
    for hook in run.hooks:
      watchdog.mark(f'the start of {type(hook).__name__}')
      stack.callback(hook.close)
      hook.start(run)
    with catching_interrupt() as interrupted:
      state = _train(run, recorder, state, watchdog)
    run.checkpoints.wait()
    if ended := _has_ended(run, int(state.step)):
      _name_best(run)
      for hook in run.hooks:
        watchdog.mark(f'the end of {type(hook).__name__}')
        hook.end(run, state)
    elif not interrupted:
      reason = f'stopped by a signal at step {int(state.step)}'
      run.message(f'{reason}; saved, will go on here')
    if run.due:
      names = ', '.join(run.due)
      run.message(f'still to be evaluated, when the run goes on: {names}')
  return state, bool(interrupted) and not ended


def _train(
  run: Run, recorder: Recorder, state: TrainState, watchdog: Alone | Watchdog
) -> TrainState:
  """The state after the last step, or the one at which a signal stops."""
  start, total = int(state.step), run.options.total_steps
  if run.due or (run.early_stopping.ends_now and start < total):
    watchdog.mark(f'evaluations of step {start}')
    if _evaluate(run, recorder, start, state):
      return state
  if _has_ended(run, start):
    run.message(_nothing_left(run, start))
    return state
  batches, period = run.batches(start), run.options.checkpoint.every_steps
  for step in range(start + 1, total + 1):
    watchdog.mark(f'the data of step {step}')
    batch = next(batches)
    watchdog.mark(f'step {step}')
    state, metrics = run.train_step(state, batch)
    recorder.add(step, metrics, batch)
    stop, last = run.should_stop(), step == total
    run.due = [e.name for e in run.evaluations if e.due(step) or last]
    if stop or last or (period and step % period == 0):
      watchdog.mark(f'the checkpoint of step {step}')
      _save(run, recorder, step, state)
    if run.due and not stop:
      watchdog.mark(f'evaluations of step {step}')
      stop = _evaluate(run, recorder, step, state)
    if stop or _has_ended(run, step):
      break
  return state


def _has_ended(run: Run, step: int) -> bool:
  """Whether the run ends after a step: its last one, or an early one."""
  is_last = step == run.options.total_steps or run.early_stopping.ended
  return is_last and not run.due


def _nothing_left(run: Run, step: int) -> str:
  if not run.early_stopping.ended:
    return f'already at step {step}: nothing left to train'
  return (
    f'ended early at step {step}: {run.early_stopping.describe()}; to go on, '
    'give more early_stopping.patience, or 0, and --resume'
  )


def _name_best(run: Run) -> None:
  """Prints which checkpoint is the best, if the run may end early."""
  if run.options.early_stopping.patience and is_first():
    step = run.checkpoints.best_step()
    run.message(
      f'the best checkpoint by {run.options.checkpoint.best_name} is that of '
      f'step {step}; moe_jax.generate --best and init_from.best read it'
    )


def _evaluate(run: Run, recorder: Recorder, step, state) -> bool:
  """Runs the evaluations that are due; returns whether a signal stopped them.

  If they end the run early, so does this, with all other evaluations; where
  less patience ends a run that goes on, those are all that is still to come.
  """
  early, measured = run.early_stopping, set[str]()
  try:
    while True:
      rows = _measure(run, recorder, step, state)
      measured |= rows.keys()
      early.add(step, rows)
      value = run.options.checkpoint.best_of(rows)
      run.due = []
      if early.ended:
        recorder.ended(step)
        others = (e.name for e in run.evaluations if not e.due(step))
        run.due = [name for name in others if name not in measured]
      is_saved = run.checkpoints.last_step == step
      if is_saved or early.is_best(step) or early.ended:
        _save(run, recorder, step, state, value)
      if not run.due:
        break
  except (Stopped, InputError) as error:
    if run.checkpoints.last_step != step:
      _save(run, recorder, step, state)
    if isinstance(error, Stopped):
      return True
    raise
  if early.ended:
    run.message(f'step {step}: ending early: {early.describe()}')
  return False


def _measure(run: Run, recorder: Recorder, step, state) -> dict[str, Row]:
  """The rows of what is due, which are recorded before anybody judges them."""
  with recorder.paused(step):
    rows = evaluation_rows(
      [e for e in run.evaluations if e.name in run.due],
      run.programs.variables(state),
      step,
      should_stop=run.should_stop,
      showing=functools.partial(recorder.evaluating, step),
    )
    recorder.evaluated(step, rows)
    for hook in run.hooks:
      hook.evaluated()
  return rows


def _save(
  run: Run, recorder: Recorder, step, state, best: float | None = None
) -> None:
  """Saves the state, or adds to what stands beside a state that is saved.

  Args:
    run: The run.
    recorder: Its recorder.
    step: The step.
    state: The state after it.
    best: The number that decides which checkpoint is the best; None where it is
      not measured.
  """
  with recorder.paused(step):
    run.confirm()
    for hook in run.hooks:
      hook.saving()
    is_new = run.checkpoints.save(
      step,
      state,
      extra={
        'data_digest': run.dataset.digest,
        NEXT_ROW: run.row_offset + step * run.options.batch_size,
        EXPERTS: run.programs.trained.masks_digest,
        DUE: run.due,
        **run.early_stopping.extra,
      },
      metrics={} if best is None else {run.options.checkpoint.best_name: best},
    )
    if is_new:
      recorder.saved(step)


# Numbers of calls, by which JAX agrees on the step after which to stop. It
# stops at a number above all that it has got, and 0 counts as one: the numbers
# of a resumed run's steps would begin beyond it.
_CALLS = itertools.count(1)
_SAVING = 'moe_jax: stopping, and saving first; another Ctrl-C stops at once'


@contextlib.contextmanager
def catching_sigterm() -> Iterator[Callable[[], bool]]:
  """Catches SIGTERM; gives a function that says whether to stop now.

  The function is called once after each step, and before each batch of an
  evaluation, until it says so. With several processes JAX catches the signal,
  and all stop at the same call, which none had made when the first of them got
  the signal.
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

  The second stops at once: in a notebook the cell, elsewhere the process.
  A caller's own handler stays, and so does that of a job that ignores Ctrl-C.
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
