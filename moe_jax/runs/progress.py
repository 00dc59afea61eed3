"""How far a run is: a bar on a terminal, plain lines anywhere else.

Not here: the numbers' computation, and how often to show them (the loop).
"""

import collections
import datetime
import io
import os
import sys
import time
from collections.abc import Callable

from rich import console, progress, table

# Time left follows the speed of this many last updates: enough to even out a
# pause for an evaluation, few enough to follow a machine that slows down.
_WINDOW = 20
_SHORT = {'token': 'tok', 'example': 'ex'}  # on a bar


class Progress:
  """Shows each update, with the time left at the speed of late.

  On a terminal it is one bar, redrawn at each update and not by a thread. A
  file, a pipe or a notebook gets a line an update, such as (without drops)

    step 1,200/3,000  loss 1.3580 nats/token  10,250 tokens/s  0:02:41 left
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    out: io.TextIOBase | None = None,
    clock: Callable[[], float] = time.monotonic,
    counted: str = 'token',
    loss_unit: str = 'nats/token',
  ):
    """Shows nothing yet.

    Args:
      total_steps: Steps at the end of the run.
      start_step: Steps taken before it, by the run this one goes on from.
      out: Where to write; None is `sys.stdout`.
      clock: Seconds since any fixed moment.
      counted: What speed is of, in the singular.
      loss_unit: What follows a loss.

    Raises:
      ValueError: `start_step` is not in [0, total_steps].
    """
    if not 0 <= start_step <= total_steps:
      raise ValueError(
        f'start_step={start_step} not in [0, total_steps={total_steps}]'
      )
    self._total_steps = total_steps
    self._out = sys.stdout if out is None else out
    self._clock = clock
    self._counted, self._loss_unit = counted, loss_unit
    self._seen = collections.deque(maxlen=_WINDOW)
    self._bar = None
    if self._out.isatty() and os.environ.get('TERM') != 'dumb':
      self._bar = _bar(self._out)
      self._task = self._bar.add_task(
        '', total=total_steps, completed=start_step, facts=''
      )

  def update(
    self,
    step: int,
    *,
    loss: float,
    tokens_per_second: float | None,
    drop_rate: float | None = None,
  ) -> None:
    """Shows the state after `step` steps.

    Args:
      step: Steps taken, those before `start_step` included.
      loss: In `loss_unit`.
      tokens_per_second: Over all devices, an example counting as one; None,
        before it is known, is not shown.
      drop_rate: Fraction of assignments dropped; None, where nothing could
        be, is not shown.
    """
    # The bar has to leave itself room on a terminal of 80 columns.
    unit, counted = f' {self._loss_unit}', f'{self._counted}s'
    if self._bar:
      unit, counted = '', _SHORT.get(self._counted, self._counted)
    facts = [f'loss {loss:.4f}{unit}']
    if tokens_per_second is not None:
      facts.append(f'{tokens_per_second:,.0f} {counted}/s')
    if drop_rate is not None:
      facts.append(f'dropped {100 * drop_rate:.1f}%')
    left = self._seconds_left(step)
    if left is not None:
      facts.append(f'{datetime.timedelta(seconds=round(left))} left')
    if self._bar is None:
      done = f'step {step:,}/{self._total_steps:,}'
      self.message('  '.join([done, *facts]))
    else:
      self._bar.update(self._task, completed=step, facts='  '.join(facts))
      self._bar.refresh()

  def message(self, text: str) -> None:
    """Prints a line, above the bar where there is one."""
    if self._bar is None:
      print(text, file=self._out, flush=True)
    else:
      # The terminal wraps long lines better than rich: they stay copyable.
      self._bar.console.print(
        text, markup=False, highlight=False, soft_wrap=True
      )

  def _seconds_left(self, step: int) -> float | None:
    """None before two updates: the first step's time is mostly compiling."""
    self._seen.append((step, self._clock()))
    (first_step, first_time), (_, now) = self._seen[0], self._seen[-1]
    if step <= first_step:
      return None
    seconds_per_step = (now - first_time) / (step - first_step)
    return (self._total_steps - step) * seconds_per_step

  def __enter__(self) -> 'Progress':
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *exc) -> None:
    if self._bar is not None:
      self._bar.stop()


def _bar(out: io.TextIOBase) -> progress.Progress:
  return progress.Progress(
    progress.MofNCompleteColumn(table_column=table.Column(no_wrap=True)),
    progress.BarColumn(bar_width=None),
    progress.TextColumn(
      '{task.fields[facts]}',
      markup=False,
      table_column=table.Column(no_wrap=True),
    ),
    console=console.Console(file=out, force_terminal=True),
    auto_refresh=False,
    expand=True,
  )
