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

# A page is drawn beside the training, and not again before so many times the
# seconds that it took: a hundredth of the time at most.
_PAUSE = 100


class Page(Hook):
  """Writes `index.html`, `curves.png` and `load.png` into a run's folder.

  They are written at the start, anew in a thread after evaluations and before
  checkpoints, and at the end, also of a run that is stopped or fails. That one
  cannot be written is said and ends nothing. The hook comes after those whose
  files the page shows.
  """

  def __init__(self):
    self._run: Run | None = None
    self._facts = RunFacts()
    self._allow: list[str] = []
    self._outer: BaseException | None = None
    self._begin_anew()

  def _begin_anew(self) -> None:
    """Forgets the run before, whose thread has ended."""
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'page')
    self._drawing: concurrent.futures.Future[None] | None = None
    self._rest_until = 0.0
    self._problem = ''

  def start(self, run: Run) -> None:
    """Writes the first page."""
    if not is_first():
      return
    self._begin_anew()
    self._run, self._outer = run, sys.exception()
    self._allow = [
      name.partition(':')[0]
      for name in plugins.names_in(sections.section(run.given_options))
    ]
    self._guarded(self._begin)
    self._refresh()

  def evaluated(self) -> None:
    """Draws the page anew."""
    self._refresh()

  def saving(self) -> None:
    """Draws the page anew."""
    self._refresh()

  def end(self, run: Run, state: object) -> None:
    """Writes the last page, with what other hooks have left."""
    if self._run is None:
      return
    self._last(run_facts.FINISHED)
    if not self._problem:
      run.message(f'page: {run.workdir / PAGE}')
    self._run = None

  def close(self) -> None:
    """Writes the last page of a run that did not come to its end."""
    if self._run is None:
      return
    error = sys.exception()
    if error is None or error is self._outer:
      self._last(run_facts.STOPPED)
    elif isinstance(error, KeyboardInterrupt):
      self._last(run_facts.STOPPED, 'interrupted')
    else:
      folder = str(self._run.workdir)
      said = str(error).replace(folder, self._run.workdir.name)
      self._last(run_facts.FAILED, said or type(error).__name__)
    self._run = None

  @property
  def _going(self) -> Run:
    """The run, between its start and its end."""
    return cast(Run, self._run)

  def _begin(self) -> None:
    self._facts = run_facts.of_run(self._going, config_flag.file_name())
    self._facts.write(self._going.workdir)
    run_commands.write_config(self._going.workdir)

  def _last(self, state: str, said: str = '') -> None:
    self._thread.shutdown(cancel_futures=True)
    self._facts = dataclasses.replace(self._facts, state=state, said=said)

    def finish() -> None:
      self._going.confirm()
      self._facts.write(self._going.workdir)
      self._write()

    self._guarded(finish)

  def _refresh(self) -> None:
    """Lets the thread draw the page, unless it does so or did just now."""
    if self._run is None or time.monotonic() < self._rest_until:
      return
    if self._drawing is not None and not self._drawing.done():
      return
    self._drawing = self._thread.submit(self._draw)

  def _draw(self) -> None:
    began = time.monotonic()
    self._guarded(self._written)
    now = time.monotonic()
    self._rest_until = now + _PAUSE * (now - began)

  def _written(self) -> None:
    self._going.confirm()
    self._write()

  def _write(self) -> None:
    # Imported here, as a run's first step would wait for matplotlib.
    from moe_jax.analysis import run_page

    run_page.write(self._going.workdir, self._allow)

  def _guarded(self, write: Callable[[], object]) -> None:
    """Calls a function; its first error is said, and none is raised."""
    try:
      write()
    except Exception as error:
      if not self._problem:
        self._problem = f'{type(error).__name__}: {error}'
        self._going.message(f'{PAGE} was not written: {self._problem}')
