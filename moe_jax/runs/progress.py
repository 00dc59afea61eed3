"""Display of a run's progress: a bar on a terminal, plain lines elsewhere."""

import collections
import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from rich import console, progress, table

from moe_jax.cli import print_line
from moe_jax.devices import is_first

# The number of last updates whose speed predicts the time left. They are enough
# to even out a pause for an evaluation, and few enough to follow a machine that
# slows down.
_WINDOW = 20
# Seconds after which a line names the evaluation that runs, if there is no bar.
_LONG_SECONDS = 30.0


class Progress:
  """Display of a run's step, loss, speed and time left, in process 0 alone.

  On a terminal the display is one bar, which is redrawn at each update and not
  by a thread. In a file, a pipe or a notebook each update prints a line, such
  as (where no choices of experts are dropped)

    step 1,200/3,000  loss 1.3580 nats/token  10,250 tokens/s  0:02:41 left
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    out: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Prepares the display, which shows nothing before the first update.

    Args:
      total_steps: Number of steps at the end of the run.
      start_step: Number of steps already taken, where a run is resumed.
      out: Stream to write to; None is `sys.stdout`.
      clock: Function that returns seconds since any fixed moment.
    """
    self._total_steps = total_steps
    self._out, stream = out, out or sys.stdout
    self._clock = clock
    self._updates = collections.deque(maxlen=_WINDOW)
    self._bar = None
    is_terminal = stream.isatty() and os.environ.get('TERM') != 'dumb'
    if is_terminal and is_first():
      self._bar = progress.Progress(
        progress.MofNCompleteColumn(table_column=table.Column(no_wrap=True)),
        progress.BarColumn(bar_width=None),
        progress.TextColumn('{task.fields[facts]}', markup=False),
        console=console.Console(file=stream, force_terminal=True),
        auto_refresh=False,
        expand=True,
      )
      self._task = self._bar.add_task(
        '', total=total_steps, completed=start_step, facts=''
      )

  def update(self, step: int, row: Mapping[str, Any]) -> None:
    """Shows the state after `step` steps.

    Args:
      step: Number of steps taken, those before `start_step` included.
      row: The `loss`, in nats per token, and where they are known
        `tokens_per_second`, on all devices, `drop_rate`, the fraction of
        choices of experts that were dropped, and `step_seconds`, the mean of
        the last steps, which predicts the time left at the first update.
    """
    # On a bar units are short, so that the bar fits into 80 columns.
    unit, counted = ('', 'tok') if self._bar else (' nats/token', 'tokens')
    facts = [f'loss {row["loss"]:.4f}{unit}']
    if 'tokens_per_second' in row:
      facts.append(f'{row["tokens_per_second"]:,.0f} {counted}/s')
    if 'drop_rate' in row:
      facts.append(f'dropped {100 * row["drop_rate"]:.1f}%')
    self._updates.append((step, self._clock()))
    (first_step, first_time), (_, now) = self._updates[0], self._updates[-1]
    # The time before the first update is mostly spent on compiling.
    step_seconds = row.get('step_seconds')
    if step > first_step:
      step_seconds = (now - first_time) / (step - first_step)
    if step_seconds is not None:
      seconds_left = round((self._total_steps - step) * step_seconds)
      facts.append(f'{datetime.timedelta(seconds=seconds_left)} left')
    if self._bar is None:
      position = f'step {step:,}/{self._total_steps:,}'
      self.message('  '.join([position, *facts]))
    else:
      shown = '  '.join(facts)
      self._bar.update(self._task, completed=step, facts=shown, refresh=True)

  @contextlib.contextmanager
  def evaluating(self, step: int, name: str) -> Iterator[None]:
    """Shows the name of an evaluation while the body runs.

    On a progress bar the name stands in place of loss, speed and time left.
    Without a bar a line names the evaluation, if it takes over 30 seconds.
    """
    text = f'evaluating {name}'
    if self._bar is None:
      line = f'step {step}: {text}'
      timer = threading.Timer(_LONG_SECONDS, self.message, [line])
      timer.start()
      try:
        yield
      finally:
        timer.cancel()
    else:
      facts = self._bar.tasks[self._task].fields['facts']
      self._bar.update(self._task, facts=text, refresh=True)
      yield
      self._bar.update(self._task, facts=facts, refresh=True)

  def message(self, text: str) -> None:
    """Prints a line, above the bar where there is one."""
    if self._bar is not None:
      # Lines that the terminal wraps, and not rich, can be copied whole.
      self._bar.console.print(
        text, markup=False, highlight=False, soft_wrap=True
      )
    elif is_first():
      print_line(text, self._out)

  def __enter__(self) -> 'Progress':
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *exc) -> None:
    if self._bar is not None:
      self._bar.stop()
