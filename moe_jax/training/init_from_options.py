"""Options that name another run, whose parameters a run begins with.

Not here: how they are read and converted, with more options
(`moe_jax.finetuning`).
"""

import dataclasses
from collections.abc import Iterator

from moe_jax.options import NOT_EMPTY, Options, at_least, option


@dataclasses.dataclass(frozen=True)
class InitFromOptions(Options):
  """Another run whose parameters this run begins with."""

  workdir: str = option(
    '',
    'Folder of another run whose parameters this run begins with; an empty '
    'string draws parameters from the seed.',
  )
  step: int = option(
    -1,
    'Optimizer step of the checkpoint in init_from.workdir that is read; -1 is '
    'the newest good one, 0 that of an imported model.',
    at_least(-1),
    when={'workdir': NOT_EMPTY},
  )
  best: bool = option(
    False,
    'Whether the best checkpoint in init_from.workdir is read, by the '
    "evaluation of that run's checkpoint.best_eval, not the newest.",
    when={'workdir': NOT_EMPTY},
  )

  def problems(self) -> Iterator[str]:
    """A checkpoint is read by its step or as the best."""
    if self.best and self.step >= 0:
      yield f'best=True with step={self.step}: give one of them'
