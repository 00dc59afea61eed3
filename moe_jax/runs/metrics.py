"""Metrics of a run on disk, as lines of JSON and for TensorBoard.

Each line of `workdir/metrics.jsonl` is a JSON object with the optimizer `step`
and metrics such as `train/loss`, `train/layer_1/load` or `eval/valid/loss`
(losses in nats per token), each a number or a list of numbers. JSON has no NaN
or infinity; they are written as the strings 'NaN', 'Infinity' and '-Infinity',
which `read_metrics` turns back into floats.

`workdir/tensorboard` has the same numbers, but not the lists: a chart for every
expert of every layer would bury the others. `analysis.plot_style` draws them.
"""

import contextlib
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, SupportsIndex

import numpy as np

from moe_jax.errors import InputError
from moe_jax.runs.workdir import set_aside

FILE_NAME = 'metrics.jsonl'
Row = dict[str, Any]  # metrics by name: numbers, or flat lists of numbers
_NON_FINITE = ('NaN', 'Infinity', '-Infinity')

_log = logging.getLogger(__name__)


class MetricsWriter:
  """Appends rows to the metrics of a workdir, in one process of a run.

  The operating system has the whole row when `write` returns, so killing the
  process loses no row. A full disk leaves no half row: rows that do not fit
  stay in memory and are written with the next row, and TensorBoard gets no more
  rows.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    resume_step: int | None,
    due: Collection[str] = (),
  ):
    """Opens the files in the workdir, which is made if it does not exist.

    Args:
      workdir: A local folder.
      resume_step: The step of the checkpoint from which the run goes on. Later
        rows are dropped, since they are measured again, and so is a row that a
        killed process left half written. None begins a new file; an old one is
        renamed to the first free of `metrics.0.jsonl`, `metrics.1.jsonl`, ...
      due: Names of evaluations that are made at the step of the checkpoint:
        their rows of that step are dropped, too.

    Raises:
      OSError: The folder cannot be made, read or written.
      ValueError: `workdir` is a URL, where no file can be appended to.
    """
    if '://' in str(workdir):
      raise InputError(f'workdir={workdir!r} must be a local folder')
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    if path.exists() and path.stat().st_size:
      if resume_step is None:
        aside = set_aside(path)
        _log.warning('a new record begins; the old one is now %s', aside)
      else:
        _drop_after(path, resume_step, due)
    self._rows = _AppendOnly(path)
    first_step = 0 if resume_step is None else resume_step + 1
    self._events = _Events(folder / 'tensorboard', first_step)

  def write(self, step: SupportsIndex, values: Mapping[str, Any]) -> None:
    """Appends one row; a step may have several, such as one for each eval.

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
    self._rows.append(text.encode() + b'\n')
    scalars = {k: v for k, v in row.items() if not isinstance(v, list)}
    if scalars:
      self._events.append(step, scalars)

  def close(self) -> None:
    """Tries once more to write the rows in memory, and closes the files."""
    self._rows.close()
    self._events.close()

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *exc) -> None:
    self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`, oldest first.

  A run may be writing the file; its last line is left out if it is incomplete.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: Another line is not a row of metrics.
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
  """Yields (number from 1, line, row); row is None if the line holds no row."""
  with path.open('rb') as file:
    for number, line in enumerate(file, 1):
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      yield number, line, row if _is_row(row) else None


def _is_row(row: Any) -> bool:
  if not isinstance(row, dict) or type(row.get('step')) is not int:
    return False
  lists = (v if isinstance(v, list) else [v] for v in row.values())
  values = itertools.chain.from_iterable(lists)
  return all(isinstance(v, int | float) or v in _NON_FINITE for v in values)


def _drop_after(path: pathlib.Path, step: int, due: Collection[str]) -> None:
  """Rewrites the file, all or nothing, with only its rows up to `step`.

  Rows of the evaluations `due` go only up to the step before.
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


class _AppendOnly:
  """A file to which whole records are appended, even when the disk fills up."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    # The file is unbuffered, so that no record is lost with the process.
    self._file = path.open('ab', buffering=0)
    self._unwritten: list[bytes] = []

  def append(self, record: bytes) -> None:
    self._unwritten.append(record)
    unwritten_bytes = memoryview(b''.join(self._unwritten))
    size = self._file.seek(0, os.SEEK_END)
    try:
      while unwritten_bytes:
        unwritten_bytes = unwritten_bytes[self._file.write(unwritten_bytes) :]
      self._unwritten.clear()
    except OSError as error:
      # A part may have been written; the next record must not follow it.
      self._file.truncate(size)
      if len(self._unwritten) == 1:
        _log.warning('%s: rows wait in memory: %s', self._path, error)

  def close(self) -> None:
    if self._unwritten:
      self.append(b'')
    if self._unwritten:
      num_lost = sum(map(bool, self._unwritten))
      _log.error('%s: lost its last %d records', self._path, num_lost)
    self._file.close()


class _Events:
  """A new file of scalars for TensorBoard, which goes on at `first_step`.

  TensorBoard drops the scalars of this and later steps from earlier files.

  tensorboardX's summary writer is not used: on a full disk its thread dies, and
  its full queue then blocks the training loop for ever.
  """

  def __init__(self, folder: pathlib.Path, first_step: int):
    # Imported where it is used: most users of this module write no metrics.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    self._proto: Any = event_pb2
    folder.mkdir(exist_ok=True)
    # TensorBoard reads files in the order of their names. The number makes
    # names differ where a run is restarted within the same second.
    number = sum(1 for _ in folder.iterdir())
    self._writer: Any = EventsWriter(str(folder / 'events'), f'.{number:04d}')
    self._write(first_step, session_log={'status': 'START'})

  def append(self, step: int, values: Mapping[str, float]) -> None:
    value = [{'tag': k, 'simple_value': v} for k, v in values.items()]
    self._write(step, summary={'value': value})

  def _write(self, step: int, **what: Any) -> None:
    if self._writer is None:
      return
    event = self._proto.Event(wall_time=time.time(), step=step, **what)
    try:
      self._writer.write_event(event)
      self._writer.flush()
    except OSError as error:
      _log.warning('TensorBoard gets no more rows: %s', error)
      self._writer = None

  def close(self) -> None:
    if self._writer is not None:
      with contextlib.suppress(OSError):
        self._writer.close()


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
