"""Metrics of a run on disk, as lines of JSON and for TensorBoard.

Each line of `workdir/metrics.jsonl` is a JSON object with the optimizer `step`
and metrics such as `train/loss`, `train/layer_1/load` or `eval/valid/loss`
(losses in nats per token), each a number or a list of numbers. JSON has no NaN
or infinity; they are written as the strings 'NaN', 'Infinity' and '-Infinity',
which `read_metrics` turns back into floats.

`workdir/tensorboard` and trackers (`moe_jax.runs.trackers`) have the same
numbers, but not the lists: a chart for every expert of every layer would bury
the others. `analysis.plot_style` draws the loads, which are lists.
"""

import contextlib
import json
import logging
import math
import operator
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from moe_jax.errors import InputError
from moe_jax.runs.trackers import TensorBoard, begin_tracker
from moe_jax.runs.workdir import folder_of, set_aside

FILE_NAME = 'metrics.jsonl'
Row = dict[str, Any]  # metrics by name: numbers, or flat lists of numbers
_NON_FINITE = ('NaN', 'Infinity', '-Infinity')

_log = logging.getLogger(__name__)


class MetricsWriter(contextlib.AbstractContextManager['MetricsWriter']):
  """Appends rows to the metrics of a workdir, in one process of a run.

  The rows go to the file `metrics.jsonl`, to TensorBoard and to trackers.
  TensorBoard or a tracker gets no more rows once it fails; in `metrics.jsonl`
  no row may be missing. The operating system has the whole row when `write`
  returns, so killing the process loses no row. A full disk leaves no half row:
  rows that do not fit stay in memory and are written with the next row.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    resume_step: int | None,
    due: Collection[str] = (),
    trackers: Sequence[str] = (),
  ):
    """Opens the files of metrics in a workdir, which is made if missing.

    Args:
      workdir: A local folder.
      resume_step: The step of the checkpoint from which the run goes on. Later
        rows are dropped, since they are measured again, and so is a row that a
        killed process left half written. None begins a new file; an old file is
        renamed to the first free of `metrics.0.jsonl`, `metrics.1.jsonl`, ...
      due: Names of evaluations that are made at the step of the checkpoint:
        their rows of that step are dropped, too.
      trackers: Names, in `trackers.TRACKERS`, of trackers that get the rows.

    Raises:
      OSError: The folder cannot be made, read or written.
      ValueError: `workdir` is a URL, where no file can be appended to; or a
        tracker cannot begin.
    """
    folder = folder_of(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    self._path, is_new = folder / FILE_NAME, resume_step is None
    if self._path.exists() and self._path.stat().st_size:
      if resume_step is None:
        aside = set_aside(self._path)
        _log.warning('a new record begins; the old one is now %s', aside)
      else:
        _drop_after(self._path, resume_step, due)
    # The file is unbuffered, so that no row is lost with the process.
    self._file, self._unwritten = self._path.open('ab', buffering=0), b''
    first_step = 0 if resume_step is None else resume_step + 1
    # Each has the methods `write(step, row)` and `close()`.
    self._others: list[Any] = [TensorBoard(folder / 'tensorboard', first_step)]
    for name in trackers:
      self._others.append(begin_tracker(name, folder, is_new))

  def write(self, step: SupportsIndex, values: Mapping[str, Any]) -> None:
    """Appends a row of metrics; a step may have several rows.

    Args:
      step: Number of optimizer steps taken.
      values: Numbers or flat lists of numbers by name, also as numpy or jax
        arrays of rank 0 or 1.

    Raises:
      ValueError: A value is neither a number nor such a list, or is named
        'step'.
    """
    if 'step' in values:
      raise InputError("'step' is the row's own key; values cannot set it")
    row = {key: python_numbers(key, value) for key, value in values.items()}
    step = operator.index(step)
    encoded = {key: _encode(value) for key, value in row.items()}
    text = json.dumps({'step': step} | encoded, allow_nan=False)
    self._append(text.encode() + b'\n')
    numbers = {k: v for k, v in row.items() if not isinstance(v, list)}
    for writer in [*self._others] if numbers else ():
      try:
        writer.write(step, numbers)
      except Exception as error:  # trackers have errors of their own
        name = type(writer).__name__
        _log.warning('%s gets no more rows: %s', name, error)
        self._others.remove(writer)

  def _append(self, line: bytes) -> None:
    """Appends a line to the file, behind the lines that wait in memory."""
    is_first = not self._unwritten
    self._unwritten += line
    size, rest = self._file.seek(0, os.SEEK_END), memoryview(self._unwritten)
    try:
      while rest:
        rest = rest[self._file.write(rest) :]
      self._unwritten = b''
    except OSError as error:
      # A part may have been written; the next row must not follow it.
      self._file.truncate(size)
      if is_first:
        _log.warning('%s: rows wait in memory: %s', self._path, error)

  def close(self) -> None:
    """Tries once more to write the rows in memory, and closes the files."""
    self._append(b'')
    if num_lost := self._unwritten.count(b'\n'):
      _log.error('%s: lost its last %d rows', self._path, num_lost)
    self._file.close()
    for writer in self._others:
      try:
        writer.close()
      except Exception as error:
        _log.warning('%s: %s', type(writer).__name__, error)

  def __exit__(self, *exc) -> None:
    self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`, oldest first.

  A run may be writing the file; its last line is left out if it is incomplete.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: A line that is complete is not a row of metrics.
  """
  rows = []
  for number, line, row in _lines(pathlib.Path(path)):
    if row is not None:
      rows.append({key: _decode(value) for key, value in row.items()})
    elif line.endswith(b'\n'):
      raise InputError(f'{path}: line {number} is not a row of metrics')
  return rows


def _lines(
  path: pathlib.Path,
) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
  """Yields each line of a file of metrics as (number from 1, line, row).

  The row is None if the line is no row of metrics.
  """
  with path.open('rb') as file:
    for number, line in enumerate(file, 1):
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      is_row = isinstance(row, dict) and type(row.get('step')) is int
      yield number, line, row if is_row else None


def _drop_after(path: pathlib.Path, step: int, due: Collection[str]) -> None:
  """Rewrites a file of metrics, all or nothing, without rows after `step`.

  Rows of the evaluations named in `due` are dropped at `step` itself, too, and
  so are lines that are no rows.
  """
  prefixes = tuple(f'eval/{name}/' for name in due)
  copy = path.with_name(f'{path.name}.tmp')
  unreadable = []
  with copy.open('wb') as file:
    for number, line, row in _lines(path):
      if row is None:
        if line.endswith(b'\n'):
          unreadable.append(number)
      elif row['step'] < step or (
        row['step'] == step and not any(k.startswith(prefixes) for k in row)
      ):
        file.write(line.rstrip(b'\n') + b'\n')
    file.flush()
    os.fsync(file.fileno())
  copy.replace(path)
  if unreadable:
    _log.warning('%s: dropped unreadable lines %s', path, unreadable)


def python_numbers(key: str, value: Any) -> Any:
  """A metric as a Python number or a list of them; `key` is for messages.

  Raises:
    ValueError: The value is neither a number nor a flat list of numbers.
  """
  try:
    array = np.asarray(value)
  except ValueError:  # ragged
    array = np.asarray(None)
  # numpy's kind of bfloat16 is 'V'.
  if array.ndim > 1 or array.dtype.kind not in 'biufV' or array.dtype.names:
    raise InputError(
      f'{key}={value!r} is neither a number nor a flat list of numbers'
    )
  return array.tolist()


def _encode(value: Any) -> Any:
  if isinstance(value, list):
    return [_encode(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return json.dumps(value)  # one of _NON_FINITE
  return value


def _decode(value: Any) -> Any:
  if isinstance(value, list):
    return [_decode(item) for item in value]
  return float(value) if value in _NON_FINITE else value
