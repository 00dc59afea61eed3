"""Options of a run's checkpoints: folder, period, and how many are kept."""

import dataclasses
from collections.abc import Mapping

from moe_jax.options import NOT_EMPTY, Options, at_least, option, unknown
from moe_jax.runs.metrics import Row
from moe_jax.runs.storage_errors import Retry


@dataclasses.dataclass(frozen=True)
class CheckpointOptions(Options):
  """Options of a run's checkpoints: the section 'checkpoint' of a config."""

  directory: str = option(
    '',
    "Folder or bucket for this run's checkpoints alone, such as "
    "'gs://bucket/run'; an empty string puts them into the workdir.",
  )
  every_steps: int = option(
    500,
    'Number of optimizer steps between two checkpoints. One is also written at '
    'the end of the run and on SIGTERM; 0 writes only those.',
    at_least(0),
  )
  keep_newest: int = option(
    2, 'Number of the newest checkpoints that are kept.', at_least(1)
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
    when={'keep_best': (True,)},
  )
  best_metric: str = option(
    'loss',
    'Number of the evaluation checkpoint.best_eval that decides which '
    "checkpoint is the best, such as 'exact_match'.",
    NOT_EMPTY,
    when={'keep_best': (True,)},
  )
  best_is_highest: bool = option(
    False,
    'Whether the checkpoint with the highest number is the best, as for an '
    'accuracy; otherwise the lowest is.',
    when={'keep_best': (True,)},
  )
  tries: int = option(
    3,
    'Number of times that writing or reading a checkpoint is tried when '
    'storage reports an error that may pass (a full disk does not). Above 1, '
    'the host keeps a copy of what is being saved. Several processes try only '
    'once to write arrays.',
    at_least(1),
  )
  retry_seconds: float = option(
    1.0,
    'Seconds before the second try to write or read a checkpoint; each further '
    'wait is twice as long, and 0 does not wait.',
    at_least(0),
    when={'tries': at_least(2)},
  )

  @property
  def best_name(self) -> str:
    """The name of the number that decides which checkpoint is the best."""
    if self.best_metric == 'loss':
      return self.best_eval
    return f'{self.best_eval}/{self.best_metric}'

  def best_of(self, rows: Mapping[str, Row]) -> float | None:
    """The number that decides which checkpoint is the best.

    Args:
      rows: The rows of evaluations, by name.

    Returns:
      The number; None if its evaluation is not among them.

    Raises:
      ValueError: The evaluation's row lacks the number.
    """
    row = rows.get(self.best_eval)
    if row is None or self.best_metric not in row:
      if row is not None and self.keep_best:
        raise unknown('checkpoint.best_metric', self.best_metric, row)
      return None
    return float(row[self.best_metric])

  @property
  def retry(self) -> Retry:
    """The rule by which storage is tried again after an error."""
    return Retry(self.tries, self.retry_seconds)

  def shrunk(self) -> 'CheckpointOptions':
    """The same options with a checkpoint at the end of the run only."""
    return dataclasses.replace(self, every_steps=0)
