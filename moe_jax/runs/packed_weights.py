"""The variables of a run that is not trained, in one safetensors file.

A run's folder may have this file in place of checkpoints: where kernels are
stored in codes of few bits, or where a model is written to be served and not to
be trained. Sizes and digests are in a manifest like that of a checkpoint.
Nothing is unpickled. Not here: checkpoints (`checkpointer.py`).
"""

import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.errors import InputError
from moe_jax.runs import finite
from moe_jax.runs import manifest as manifest_lib
from moe_jax.runs.checkpointer import CheckpointError, Restored

FOLDER = 'weights'  # in the run's folder
FILE = 'weights.safetensors'


def write(folder: pathlib.Path, variables: dict[str, Any]) -> None:
  """Writes the variables into a run's folder, which has none.

  Args:
    folder: The run's folder.
    variables: 'params', and 'router_state' where the model has it, on the host
      or on devices.
  """
  variables = jax.tree.map(jax.numpy.asarray, variables)
  manifest = manifest_lib.make(0, variables, {}, {})
  subdir = folder / FOLDER
  subdir.mkdir()
  arrays = {
    manifest_lib.name(path): np.asarray(leaf, order='C')
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
  }
  save_file(arrays, subdir / FILE)
  manifest_lib.write(epath.Path(subdir), manifest)


def are_in(folder: pathlib.Path) -> bool:
  """Whether a run's folder has such variables."""
  return (folder / FOLDER).is_dir()


def read(
  folder: pathlib.Path, abstract: Any, step: int | None = None
) -> Restored:
  """Reads the variables of a run's folder, after its files are verified.

  Args:
    folder: The run's folder.
    abstract: The tree of `jax.ShapeDtypeStruct`, with shardings, that is
      wanted. Floating-point arrays may have other types in the file.
    step: The step that is wanted; the variables are of step 0.

  Raises:
    ValueError: The step is another one, or the file holds other variables.
    CheckpointError: The file is damaged or missing, or a value is not finite.
  """
  subdir = epath.Path(folder / FOLDER)
  if step:
    raise InputError(
      f'{folder} has weights without checkpoints, of step 0 alone; step={step} '
      'does not exist'
    )
  try:
    manifest = manifest_lib.read(subdir)
    manifest_lib.verify(subdir, manifest)
  except manifest_lib.BadCheckpoint as error:
    raise CheckpointError(f'{subdir} is damaged: {error}') from None
  manifest_lib.check_tree(manifest, abstract, subdir, partial=True, cast=True)
  try:
    # Mapped pages would count as memory of this process until it ends.
    file = safe_open(subdir / FILE, framework='numpy', backend='pread')
    state = jax.tree_util.tree_map_with_path(
      lambda path, leaf: jax.device_put(
        file.get_tensor(manifest_lib.name(path)).astype(leaf.dtype),
        leaf.sharding,
      ),
      abstract,
    )
  except (OSError, SafetensorError) as error:
    raise CheckpointError(f'{subdir / FILE} cannot be read: {error}') from None
  if bad := finite.not_finite(state):
    raise CheckpointError(f'{subdir / FILE}: not finite: {finite.listed(bad)}')
  return Restored(state, manifest.extra, 0, [])
