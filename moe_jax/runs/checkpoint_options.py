"""Options of a run's checkpoints: where, when, and which are kept.

Not here: how they are written (`checkpointer.py`) and deleted (`retention.py`).
"""

import dataclasses

from moe_jax.options import Options, at_least, option
from moe_jax.runs.storage_errors import Retry


@dataclasses.dataclass(frozen=True)
class CheckpointOptions(Options):
  """The section 'checkpoint' of a config."""

  directory: str = option(
    '',
    "Folder or bucket of this run's checkpoints alone, such as "
    "'gs://bucket/run'; with an empty string they are in the workdir.",
  )
  every_steps: int = option(
    500,
    'Number of optimizer steps between two checkpoints; one is also written at '
    'the end and on SIGTERM. 0 writes those alone.',
    at_least(0),
  )
  keep_newest: int = option(
    2, 'Number of the newest checkpoints that are kept.', at_least(1)
  )
  keep_best: bool = option(
    True,
    'Whether the checkpoint with the lowest loss of `best_eval` is kept '
    'besides the newest.',
  )
  best_eval: str = option(
    'train_capacity',
    'Name of the evaluation whose loss says which checkpoint is the best. One '
    'of a step at which it did not run is never the best.',
    when={'keep_best': (True,)},
  )
  tries: int = option(
    3,
    'Number of times that writing or reading is tried when storage fails in a '
    'way that may pass; a full disk is none. Above 1, the host keeps a copy of '
    'what is being saved. Several processes write arrays once.',
    at_least(1),
  )
  retry_seconds: float = option(
    1.0,
    'Number of seconds before the second try; each wait after it is twice as '
    'long.',
    at_least(0),
    when={'tries': at_least(2)},
  )

  @property
  def retry(self) -> Retry:
    """How storage errors are tried again."""
    return Retry(self.tries, self.retry_seconds)

  def shrunk(self) -> 'CheckpointOptions':
    """Checkpoints at the end alone."""
    return dataclasses.replace(self, every_steps=0)
