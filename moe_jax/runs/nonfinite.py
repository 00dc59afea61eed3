"""Batches of steps whose loss or gradient was not finite, kept for analysis.

`workdir/nonfinite/<step>.npz` has the arrays of the global batch by name.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

FOLDER = 'nonfinite'


def steps(workdir: pathlib.Path) -> set[int]:
  """The steps whose batches are kept, also those from before a restart."""
  numbers = [path.stem for path in (workdir / FOLDER).glob('*.npz')]
  return {int(n) for n in numbers if n.isdigit()}


def forget(workdir: pathlib.Path, step: int) -> None:
  """Removes the batch of a step that was repeated and then was finite."""
  if jax.process_index() == 0:
    (workdir / FOLDER / f'{step}.npz').unlink(missing_ok=True)


def keep(
  workdir: pathlib.Path, step: int, batch: Mapping[str, jax.Array]
) -> pathlib.Path:
  """Writes the batch of `step`, all or nothing; every process calls this.

  Raises:
    OSError: The file cannot be written.
  """
  path = workdir / FOLDER / f'{step}.npz'
  arrays: dict[str, Any] = {
    name: _host_array(array) for name, array in batch.items()
  }
  if jax.process_index() == 0:
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix('.tmp')
    with unfinished.open('wb') as file:
      np.savez(file, **arrays)
    unfinished.replace(path)
  return path


def _host_array(array: jax.Array) -> np.ndarray:
  if array.is_fully_addressable:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))
