"""A directory of checkpoints: its options, what is good, what is deleted.

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
from collections.abc import Mapping

from etils import epath

from moe_jax.config import Options, option, unknown
from moe_jax.errors import ReportedError
from moe_jax.runs import manifest as manifest_lib
from moe_jax.runs.manifest import MOST_STEPS, BadCheckpoint, Manifest
from moe_jax.runs.metrics import Row
from moe_jax.runs.storage_errors import Retry, storage_path

_LOG = logging.getLogger(__name__)
_STEP = re.compile(r'0|[1-9][0-9]{0,9}')
_LEFTOVER = re.compile(r'\d+\.(saving|deleting|orbax-checkpoint-tmp)')
_TRIES = 20  # to remove a folder to which a failed save may still write


class CheckpointError(ReportedError, RuntimeError):
  """A checkpoint cannot be written or read; no other checkpoint was changed."""


@dataclasses.dataclass(frozen=True)
class CheckpointOptions(Options):
  """Options of a run's checkpoints: the section `checkpoint` of the config."""

  directory: str = option(
    '',
    "Folder or bucket for this run's checkpoints alone, such as "
    "'gs://bucket/run'; an empty string puts them into the workdir.",
  )
  every_steps: int = option(
    500,
    'Number of optimizer steps between two checkpoints. One is also written at '
    'the end of the run and on SIGTERM; 0 writes only those.',
    minimum=0,
  )
  keep_newest: int = option(
    2, 'Number of the newest checkpoints that are kept.', minimum=1
  )
  keep_best: bool = option(
    True,
    'Whether the best checkpoint, by the evaluation checkpoint.best_eval, is '
    'kept besides the newest ones.',
  )
  best_eval: str = option(
    'train_capacity',
    'Name of the evaluation that decides which checkpoint is the best. A '
    'checkpoint of a step without that evaluation is never the best.',
  )
  best_metric: str = option(
    'loss',
    'Number of the evaluation checkpoint.best_eval that decides which '
    "checkpoint is the best, such as 'exact_match'.",
    required=True,
  )
  best_is_highest: bool = option(
    False,
    'Whether the checkpoint with the highest number is the best, as for an '
    'accuracy; otherwise the lowest is.',
  )
  tries: int = option(
    3,
    'Number of times that writing or reading a checkpoint is tried when '
    'storage reports an error that may pass (a full disk does not). Above 1, '
    'the host keeps a copy of what is being saved. Several processes try only '
    'once to write arrays.',
    minimum=1,
  )
  retry_seconds: float = option(
    1.0,
    'Seconds before the second try to write or read a checkpoint; each further '
    'wait is twice as long, and 0 does not wait.',
    minimum=0,
  )

  @property
  def best_name(self) -> str:
    """The name in a manifest of the number that decides the best checkpoint."""
    if self.best_metric == 'loss':
      return self.best_eval
    return f'{self.best_eval}/{self.best_metric}'

  def best_of(self, rows: Mapping[str, Row]) -> float | None:
    """Picks from evaluations' rows the number that decides the best checkpoint.

    Args:
      rows: The rows of evaluations, by name.

    Returns:
      The number; None if `rows` lacks it.

    Raises:
      ValueError: The row of `best_eval` lacks the number, and `keep_best` is
        True.
    """
    row = rows.get(self.best_eval)
    if row is None or self.best_metric not in row:
      if row is not None and self.keep_best:
        raise unknown('checkpoint.best_metric', self.best_metric, row)
      return None
    return float(row[self.best_metric])

  def shrunk(self) -> 'CheckpointOptions':
    return dataclasses.replace(self, every_steps=0)


@dataclasses.dataclass
class Directory:
  """Finds, verifies and deletes the checkpoints of a directory, by step.

  Attributes:
    directory: The directory, which the first save makes; for one run at a time.
    options: The options of the checkpoints; their own `directory` is not read.
    path: The directory as an absolute path, or a URL.
    retry: Calls a function again after a transient error of storage.
  """

  directory: str | os.PathLike
  options: CheckpointOptions = CheckpointOptions()

  def __post_init__(self):
    self.path = storage_path(self.directory)
    self.retry = Retry(self.options.tries, self.options.retry_seconds)

  def folder(self, step: int, suffix: str = '') -> epath.Path:
    """The folder of a checkpoint; with a suffix ('.aside') it is not in use."""
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
    """The step with the best finite metric, the earliest of equals, or None."""
    values, name = {}, self.options.best_name
    for step in self.steps():
      try:
        value = self.manifest(step).metrics.get(name, math.nan)
      except BadCheckpoint:
        continue
      if math.isfinite(value):
        values[step] = value
    choose = max if self.options.best_is_highest else min
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
    return next((n for n in self.folders()[::-1] if not self.problem(n)), None)

  def problem(self, step: int) -> str:
    """The damage of a checkpoint; '' if all files are as they were written."""
    try:
      self.retry(manifest_lib.verify, self.folder(step), self.manifest(step))
    except BadCheckpoint as error:
      return str(error)
    except OSError as error:
      return f'{error.filename} unreadable ({error.strerror})'
    return ''

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
    """Deletes all checkpoints except those that the options keep.

    These are the `keep_newest` newest ones and, with `keep_best`, the best.
    """
    steps = self.steps()
    kept_steps: set[int | None] = set(steps[-self.options.keep_newest :])
    if self.options.keep_best:
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
