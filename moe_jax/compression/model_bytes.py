"""The size of a model as it is served: in memory and on disk."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.runs.workdir import CHECKPOINTS


def bytes_in_memory(variables: Mapping[str, Any]) -> int:
  """The bytes of all arrays of a model's variables, codes included."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(variables))


def bytes_on_disk(workdir: str | os.PathLike[str]) -> int:
  """The bytes of the files with a run's variables.

  Files of checkpoints include the optimizer's state.
  """
  folder = pathlib.Path(workdir).expanduser()
  return sum(
    path.stat().st_size
    for path in (folder / CHECKPOINTS).rglob('*')
    if path.is_file()
  )
