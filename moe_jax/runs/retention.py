"""A directory of checkpoints: tells which are good, and deletes old ones.

The folder `<step>` is a checkpoint with a manifest. It is written under the
name `<step>.saving1` and renamed once it has a manifest, and is renamed to
`<step>.deleting` before it is removed. So at whatever moment a process dies, a
folder whose name is a number is complete or does not match its manifest. A
checkpoint that a run does not go on from becomes `<step>.aside` (`.aside2`,
...) and is never deleted. Only a saving run changes the directory, so other
processes may read it meanwhile.
"""

import dataclasses
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator

from etils import epath

from moe_jax.errors import ReportedError
from moe_jax.runs import manifest as manifest_lib
from moe_jax.runs.manifest import MOST_STEPS, BadCheckpoint, Manifest
from moe_jax.runs.storage_errors import Retry, storage_path

_LOG = logging.getLogger(__name__)
_STEP = re.compile(r'0|[1-9][0-9]{0,9}')
_LEFTOVER = re.compile(r'\d+\.(saving|deleting|orbax-checkpoint-tmp)')
_TRIES = 20


class CheckpointError(ReportedError, RuntimeError):
  """A checkpoint could not be written or read; all other ones are untouched."""


@dataclasses.dataclass
class Directory:
  """Finds, verifies and deletes the checkpoints of a directory, by step.

  Attributes:
    directory: The directory, which the first save makes; for one run at a time.
    keep_newest: Number of the newest checkpoints that are kept, at least 1.
    keep_best: Whether the checkpoint with the best `best_metric` is kept, too.
    best_metric: Name of a metric of the checkpoints; the lowest is the best.
    best_is_highest: Whether the highest `best_metric` is the best instead.
    retry: The rule by which storage is tried again after a transient error.
  """

  directory: str | os.PathLike
  keep_newest: int = 2
  keep_best: bool = True
  best_metric: str = 'loss'
  best_is_highest: bool = False
  retry: Retry = Retry()

  def __post_init__(self):
    self.path = storage_path(self.directory)

  def folder(self, step: int, suffix: str = '') -> epath.Path:
    """The folder of a checkpoint; a suffix marks one being saved or deleted."""
    return self.path / f'{step}{suffix}'

  def folders(self) -> list[int]:
    """The steps that have a checkpoint, even a damaged one, ascending."""
    names = self.retry(self._names)
    steps = (int(name) for name in names if _STEP.fullmatch(name))
    return sorted(step for step in steps if step < MOST_STEPS)

  def _names(self) -> list[str]:
    if not self.path.exists():
      return []
    return [path.name for path in self.path.iterdir()]

  def steps(self) -> list[int]:
    """The steps of checkpoints with a manifest, ascending.

    The files of the checkpoints are not verified.
    """
    name = manifest_lib.NAME
    return [n for n in self.folders() if (self.folder(n) / name).exists()]

  def best_step(self) -> int | None:
    """The step with the best finite `best_metric`, the earliest of equals."""
    values = {}
    for step in self.steps():
      try:
        value = self.manifest(step).metrics.get(self.best_metric, math.nan)
      except BadCheckpoint:
        continue
      if math.isfinite(value):
        values[step] = value
    choose = max if self.best_is_highest else min
    return choose(values, key=values.__getitem__, default=None)

  def manifest(self, step: int) -> Manifest:
    """Reads the manifest of the checkpoint of a step.

    Raises:
      BadCheckpoint: There is no manifest, or it is damaged or of another step.
    """
    try:
      manifest = self.retry(manifest_lib.read, self.folder(step))
    except OSError as error:
      raise BadCheckpoint(f'manifest unreadable ({error!r:.80})') from None
    if manifest.step != step:
      raise BadCheckpoint(f'manifest is of step {manifest.step}')
    return manifest

  def newest_good(self) -> int | None:
    """The newest step whose checkpoint has all files as written, or None."""
    return next(self.good_steps(self.folders()[::-1], []), None)

  def good_steps(
    self, candidates: Iterable[int], bad: list[tuple[int, str]]
  ) -> Iterator[int]:
    """Yields the steps whose checkpoints have all files as written.

    Args:
      candidates: The steps to verify, one after another.
      bad: A list, to which (step, reason) is added for each candidate whose
        checkpoint is not good.
    """
    for step in candidates:
      try:
        self.retry(manifest_lib.verify, self.folder(step), self.manifest(step))
        yield step
      except BadCheckpoint as error:
        bad.append((step, str(error)))
      except OSError as error:
        bad.append((step, f'{error.filename} unreadable ({error.strerror})'))

  def make_room(self, step: int, last: int | None) -> None:
    """Prepares the directory for a save.

    Checkpoints at or after `step`, or after `last`, are set aside: they are
    corrupt, or this run did not go on from them, and must neither block the
    save nor count among the newest.

    Args:
      step: The step that will be saved.
      last: The step that this run last saved or restored; None for a new run.
    """
    self.path.mkdir(parents=True, exist_ok=True)
    if removed := self.remove_leftovers():
      _LOG.warning('removed unfinished %s in %s', removed, self.path)
    for old in self.folders():
      if old >= step or (last is not None and old > last):
        self._set_aside(old)

  def remove_leftovers(self) -> list[str]:
    """Removes half written and half deleted folders; returns their names.

    Threads of a save that just failed may still be writing, which makes
    removal fail. So removal is tried for a second, and again at the next save.
    """
    removed = set()
    for _ in range(_TRIES):
      leftovers = [name for name in self._names() if _LEFTOVER.match(name)]
      if not leftovers:
        break
      removed.update(leftovers)
      for name in leftovers:
        try:
          (self.path / name).rmtree()
        except OSError:
          time.sleep(1 / _TRIES)
    return sorted(removed)

  def prune(self) -> None:
    """Deletes all checkpoints except the newest ones and the best."""
    steps = self.steps()
    kept_steps: set[int | None] = set(steps[-self.keep_newest :])
    if self.keep_best:
      kept_steps.add(self.best_step())
    for step in steps:
      if step in kept_steps:
        continue
      try:
        self.folder(step).rename(self.folder(step, '.deleting'))
        self.folder(step, '.deleting').rmtree()
      except OSError as error:  # the checkpoint just saved is good nevertheless
        _LOG.warning('could not delete checkpoint %d: %s', step, error)

  def _set_aside(self, step: int) -> None:
    aside, count = self.folder(step, '.aside'), 1
    while aside.exists():
      count += 1
      aside = self.folder(step, f'.aside{count}')
    self.folder(step).rename(aside)
    _LOG.warning('set checkpoint %d aside as %s', step, aside)
