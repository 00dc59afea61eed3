"""Options that name another run, whose parameters a run begins with."""

import dataclasses
import pathlib
from collections.abc import Iterator

from moe_jax.data import DataOptions, tokenizers
from moe_jax.options import NOT_EMPTY, Options, at_least, option
from moe_jax.runs import workdir as workdir_lib


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

  keep_tokenizer: bool = option(
    True,
    'Whether the tokenizer of the run in init_from.workdir is taken in place '
    'of data.tokenizer, so that other text can be learned from; with False '
    'data.tokenizer has to give the same ids.',
    when={'workdir': NOT_EMPTY},
  )

  def with_tokenizer(
    self, data: DataOptions, run_folder: pathlib.Path | None = None
  ) -> DataOptions:
    """The data with the tokenizer of the other run, if it is kept.

    A run that has begun has the tokenizer in its own folder, and does not need
    the other run.

    Args:
      data: The options of the data.
      run_folder: Folder of the run that begins with the other, which need not
        exist.

    Raises:
      ValueError: The tokenizer cannot be read.
    """
    if not (self.workdir and self.keep_tokenizer):
      return data
    folders = [] if run_folder is None else [run_folder]
    for folder in (*folders, pathlib.Path(self.workdir).expanduser()):
      path = folder / workdir_lib.TOKENIZER
      if path.is_file():
        return data.with_tokenizer(tokenizers.read(path))
    return data  # the other run, which has none, is refused when it is read

  def problems(self) -> Iterator[str]:
    """The problem of a checkpoint that is named by its step and as the best."""
    if self.best and self.step >= 0:
      yield f'best=True with step={self.step}: give one of them'
