"""The hook that keeps a run's page and pictures up to date.

Not here: the page (`run_page.py`).
"""

import concurrent.futures
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import cast

from moe_jax import config_flag, plugins, sections
from moe_jax.analysis import run_commands, run_facts
from moe_jax.analysis.run_facts import RunFacts
from moe_jax.analysis.run_files import PAGE
from moe_jax.distributed import is_first
from moe_jax.training.setup import Hook, Run

# A page is drawn beside the training. The next one waits for this many times
# the seconds that it took: drawing takes a hundredth of the time at most.
_PAUSE = 100


class Page(Hook):
  """Writes `index.html`, `curves.png` and `load.png` into a run's folder.

  They are written at the start, anew in a thread after evaluations and before
  checkpoints, and at the end, also of a run that is stopped or fails. If one
  cannot be written, the run says so and goes on. The hook comes after those
  whose files the page shows.
  """

  def __init__(self):
    self._run: Run | None = None
    self._facts = RunFacts()
    self._allow: list[str] = []
    self._outer_error: BaseException | None = None
    self._begin_anew()

  def _begin_anew(self) -> None:
    """Forgets the run before, whose thread has ended."""
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'page')
    self._drawing: concurrent.futures.Future[None] | None = None
    self._pause_until = 0.0
    self._problem = ''

  def start(self, run: Run) -> None:
    """Writes the first page."""
    if not is_first():
      return
    self._begin_anew()
    self._run, self._outer_error = run, sys.exception()
    self._allow = [
      name.partition(':')[0]
      for name in plugins.names_in(sections.section(run.given_options))
    ]
    self._guarded(self._write_facts)
    self._refresh()

  def evaluated(self) -> None:
    """Draws the page anew."""
    self._refresh()

  def saving(self) -> None:
    """Draws the page anew."""
    self._refresh()

  def end(self, run: Run, state: object) -> None:
    """Writes the last page, with the files that other hooks have written."""
    if self._run is None:
      return
    self._write_last(run_facts.FINISHED)
    if not self._problem:
      run.message(f'page: {run.workdir / PAGE}')
    self._run = None

  def close(self) -> None:
    """Writes the last page of a run that did not come to its end."""
    if self._run is None:
      return
    error = sys.exception()
    if error is None or error is self._outer_error:
      self._write_last(run_facts.STOPPED)
    elif isinstance(error, KeyboardInterrupt):
      self._write_last(run_facts.STOPPED, 'interrupted')
    else:
      folder = str(self._run.workdir)
      error_message = str(error).replace(folder, self._run.workdir.name)
      self._write_last(run_facts.FAILED, error_message or type(error).__name__)
    self._run = None

  @property
  def _active_run(self) -> Run:
    """The run, between its start and its end."""
    return cast(Run, self._run)

  def _write_facts(self) -> None:
    self._facts = run_facts.of_run(self._active_run, config_flag.file_name())
    self._facts.write(self._active_run.workdir)
    run_commands.write_config(self._active_run.workdir)

  def _write_last(self, state: str, message: str = '') -> None:
    self._thread.shutdown(cancel_futures=True)
    self._facts = dataclasses.replace(self._facts, state=state, said=message)

    def finish() -> None:
      self._active_run.confirm()
      self._facts.write(self._active_run.workdir)
      self._write()

    self._guarded(finish)

  def _refresh(self) -> None:
    """Lets the thread draw the page, unless it does so or did just now."""
    if self._run is None or time.monotonic() < self._pause_until:
      return
    if self._drawing is not None and not self._drawing.done():
      return
    self._drawing = self._thread.submit(self._draw)

  def _draw(self) -> None:
    start_time = time.monotonic()
    self._guarded(self._confirm_and_write)
    now = time.monotonic()
    self._pause_until = now + _PAUSE * (now - start_time)

  def _confirm_and_write(self) -> None:
    self._active_run.confirm()
    self._write()

  def _write(self) -> None:
    # Imported here, as a run's first step would wait for matplotlib.
    from moe_jax.analysis import run_page

    run_page.write(self._active_run.workdir, self._allow)

  def _guarded(self, write: Callable[[], object]) -> None:
    """Calls a function; its first error is said, and none is raised."""
    try:
      write()
    except Exception as error:
      if not self._problem:
        self._problem = f'{type(error).__name__}: {error}'
        self._active_run.message(f'{PAGE} was not written: {self._problem}')
