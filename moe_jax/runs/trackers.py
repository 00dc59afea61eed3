"""Writers of a run's metrics for TensorBoard, Weights & Biases and MLflow.

TensorBoard reads a folder of the workdir. Weights & Biases and MLflow are
services, chosen by the option `trackers` of a config and set up by environment
variables of their own, such as WANDB_PROJECT and MLFLOW_TRACKING_URI. Each is a
class with `write(step, row)` and `close()`; a row has numbers by name.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

from moe_jax.config import flatten
from moe_jax.errors import InputError, from_extra
from moe_jax.runs.workdir import kept_config


class TensorBoard:
  """A new file of scalars for TensorBoard, which begins at `first_step`.

  TensorBoard drops the scalars of `first_step` and later steps that earlier
  files of the folder have.

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

  def write(self, step: int, row: Mapping[str, float]) -> None:
    """Adds the numbers of a row of metrics as the scalars of a step."""
    value = [{'tag': k, 'simple_value': v} for k, v in row.items()]
    self._write(step, summary={'value': value})

  def _write(self, step: int, **what: Any) -> None:
    event = self._proto.Event(wall_time=time.time(), step=step, **what)
    self._writer.write_event(event)
    self._writer.flush()

  def close(self) -> None:
    """Closes the file."""
    with contextlib.suppress(OSError):
      self._writer.close()


class WeightsAndBiases:
  """A run of Weights & Biases, which has the config and a row for each step.

  `folder` is the workdir, and `run_id` the id of the run to go on with; None
  begins a new run.

  Weights & Biases ignores rows of steps that it already has, so a run that goes
  on from a checkpoint adds only the rows of new steps.
  """

  def __init__(self, folder: pathlib.Path, run_id: str | None):
    import wandb  # pyright: ignore[reportMissingImports]

    self._run = wandb.init(
      id=run_id,
      resume='allow',
      name=os.environ.get('WANDB_NAME', folder.name),
      dir=folder,
      config=kept_config(folder),
      allow_val_change=True,  # where a run goes on with another config
    )
    self.id = self._run.id

  def write(self, step: int, row: Mapping[str, float]) -> None:
    """Adds the numbers of a row, merged with other rows of the step."""
    self._run.log(dict(row), step=step)

  def close(self) -> None:
    """Ends the run of Weights & Biases; this may wait for its upload."""
    self._run.finish()


class MLflow:
  """A run of MLflow, which has the config as parameters, and the metrics.

  `folder` is the workdir, and `run_id` the id of the run to go on with; None
  begins a new run.

  A step that is taken again, by a run that goes on from a checkpoint, has its
  row there twice.
  """

  def __init__(self, folder: pathlib.Path, run_id: str | None):
    import mlflow  # pyright: ignore[reportMissingImports]

    name = os.environ.get('MLFLOW_RUN_NAME', folder.name)
    # A caller may have a run of its own that is active.
    run = mlflow.start_run(run_id=run_id, run_name=name, nested=True)
    self._mlflow, self.id = mlflow, run.info.run_id
    if run_id is None:  # parameters cannot change
      mlflow.log_params(flatten(kept_config(folder)))

  def write(self, step: int, row: Mapping[str, float]) -> None:
    """Adds the numbers of a row, in the background."""
    self._mlflow.log_metrics(
      dict(row), step=step, run_id=self.id, synchronous=False
    )

  def close(self) -> None:
    """Waits until the server has all rows, and ends the run of MLflow."""
    self._mlflow.flush_async_logging()
    self._mlflow.end_run()


# The classes of trackers, by the name in a config and of the package needed.
TRACKERS = {'wandb': WeightsAndBiases, 'mlflow': MLflow}


def check_installed(names: Iterable[str]) -> None:
  """Raises ValueError where the package of a tracker is not installed."""
  for name in names:
    from_extra(name, 'trackers', f'trackers names {name!r}')


def begin_tracker(name: str, folder: pathlib.Path, is_new: bool) -> Any:
  """Makes a tracker, which begins a run or goes on with the workdir's run.

  Args:
    name: The name of the tracker in `TRACKERS`.
    folder: The workdir, in which a file keeps the id of the tracker's run.
    is_new: Whether a new run begins, even if the workdir has an id.

  Raises:
    ValueError: The tracker's package refuses to begin, as where no user is
      logged in.
  """
  path = folder / f'{name}.id'
  run_id = path.read_text() if path.exists() and not is_new else None
  try:
    tracker = TRACKERS[name](folder, run_id)
  except Exception as error:  # each package has errors of its own
    raise InputError(f'the tracker {name!r} cannot begin: {error}') from error
  path.write_text(tracker.id)
  return tracker
