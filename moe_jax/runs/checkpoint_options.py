"""Options of a run's checkpoints: folder, period, and how many are kept.

Not here: how they are written (`checkpointer.py`) and deleted (`retention.py`).
"""

import dataclasses

from moe_jax.options import Options, at_least, option
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
    'Whether the checkpoint with the lowest loss in the evaluation '
    'checkpoint.best_eval is kept besides the newest ones.',
  )
  best_eval: str = option(
    'train_capacity',
    'Name of the evaluation whose loss decides which checkpoint is the best. A '
    'checkpoint of a step without that evaluation is never the best.',
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
  def retry(self) -> Retry:
    """How often storage is tried again after an error."""
    return Retry(self.tries, self.retry_seconds)

  def shrunk(self) -> 'CheckpointOptions':
    """The same options with a checkpoint at the end of the run only."""
    return dataclasses.replace(self, every_steps=0)
