"""Reading of a checkpoint's variables into sharded arrays.

Besides finished arrays, the host holds about as much as the checkpoint's
largest tensor, whatever the size of the model and of its stacked parameters.
"""

import dataclasses
import functools
import itertools
import logging
import math
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from moe_jax import models, partitioning
from moe_jax.errors import InputError
from moe_jax.interop.checkpoint_folder import (
  Checkpoint,
  fetch_folder,
  named_dtype,
  open_checkpoint,
  param_dtype_for,
)
from moe_jax.interop.config_keys import OPTIONAL_SIZE, SIZE
from moe_jax.interop.mapping import (
  Leaf,
  check,
  copies,
  has_encoder_table,
  leaves,
  path_in_collection,
  with_encoder_table,
  without_prefix,
)
from moe_jax.interop.tensor_files import Index, ProblemsError, TensorFiles
from moe_jax.layers.shared import RULES
from moe_jax.models import Model, ModelOptions
from moe_jax.models.trees import abstract_router_state
from moe_jax.models.trees import variables as as_variables
from moe_jax.partitioning import Rules

# The most parameters that a model may have for each value in the files; larger
# models are refused at once, before names of tensors are compared.
_MAX_RATIO = 4
_LOG = logging.getLogger(__name__)


class Loaded(NamedTuple):
  """The model of a checkpoint.

  Attributes:
    options: The options of the model, from which it is built and exported.
    model: The model.
    variables: The model's parameters, under 'params', and 'router_state' if
      the model keeps a balancing bias.
  """

  options: ModelOptions
  model: Model
  variables: dict[str, Any]


def load(
  source: str | os.PathLike[str],
  *,
  mesh: Mesh | None = None,
  rules: Rules = RULES,
  dtype: str = '',
  revision: str = '',
  allow_nonfinite: bool = False,
) -> Loaded:
  """The model of a Hugging Face checkpoint and its variables.

  Values of the checkpoint's config that act only in training and that our
  models do not have are logged.

  Args:
    source: A local folder, or the id of a repository on the hub.
    mesh: The devices of the parameters; None is the first local device.
    rules: The sharding table, such as `ShardingOptions().rules`.
    dtype: The dtype of parameters and products, 'float32' or 'bfloat16'; '' is
      the dtype that config.json names, or the files' dtype if it names none,
      with float32 for float16. Routers and norms stay float32.
    revision: A branch, tag or commit of a repository; '' is its main branch.
    allow_nonfinite: Whether weights may be infinite or no numbers. The check
      takes about 0.06 s per GB.

  Raises:
    ValueError: The architecture, a key of its config or a tensor is not
      supported; tensors are missing, unknown or of another shape; or tensors
      have values that are not finite. All problems are listed.
  """
  checkpoint = fetch(source, dtype=dtype, revision=revision)
  for note in checkpoint.notes:
    _LOG.info('%s: %s', source, note)
  variables = load_variables(
    checkpoint, mesh=mesh, rules=rules, allow_nonfinite=allow_nonfinite
  )
  model = checkpoint.options.build(rules)
  return Loaded(checkpoint.options, model, variables)


def fetch(
  source: str | os.PathLike[str], *, dtype: str = '', revision: str = ''
) -> Checkpoint:
  """Downloads a checkpoint, if need be, and reads its config, not its tensors.

  A config that is not supported is refused before weights are downloaded.

  `source` is a folder or the id of a hub repository, `dtype` that of parameters
  and products, '' for the checkpoint's own, and `revision` a branch, tag or
  commit of a repository, '' for its main branch.
  """
  open_checkpoint(fetch_folder(source, weights=False, revision=revision), dtype)
  folder = fetch_folder(source, revision=revision)
  checkpoint = open_checkpoint(folder, dtype)
  if not dtype and named_dtype(checkpoint.config) is None:
    checkpoint = open_checkpoint(
      folder, param_dtype_for(checkpoint.open_files().dtype)
    )
  names = checkpoint.architecture.names
  options: Any = checkpoint.options
  if options.embedding.tie or not options.has_encoder:
    return checkpoint
  has_own_table = has_encoder_table(names, checkpoint.open_files())
  options = dataclasses.replace(options, encoder_table=has_own_table)
  return dataclasses.replace(checkpoint, options=options)


def load_variables(
  checkpoint: Checkpoint,
  *,
  mesh: Mesh | None = None,
  rules: Rules = RULES,
  allow_nonfinite: bool = False,
) -> dict[str, Any]:
  """The sharded parameters, and the state of routers, by collection.

  Parameters are on `mesh`, by default the first local device, as the sharding
  table `rules` says. Every device holds the whole state of routers.

  Raises:
    ValueError: Tensors do not fit the config; or have values that are not
      finite, unless `allow_nonfinite` is set.
  """
  files = checkpoint.open_files()
  _check_keys(checkpoint, files)
  model = checkpoint.options.build(rules)
  trees, state = models.describe(model), abstract_router_state(model)
  shapes = as_variables(trees.shapes, state)
  # A model much larger than the files is refused before its tensors are named
  # one by one.
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  if count > _MAX_RATIO * files.num_values:
    raise InputError(
      f'{checkpoint.folder}: config.json describes a model of {count} '
      f'parameters, the tensors have {files.num_values} values'
    )
  leaves_by_path = _checked_leaves(checkpoint, model, shapes, files)
  if mesh is None:
    mesh = partitioning.make_mesh(dict(data=1), jax.local_devices()[:1])
  replicated = partitioning.sharding(mesh, rules, ())
  shardings = as_variables(
    partitioning.tree_shardings(mesh, rules, trees.axes, trees.shapes),
    jax.tree.map(lambda _: replicated, state),
  )

  def load_one(path, shape, sharding):
    leaf = leaves_by_path[path_in_collection(path)]
    return load_leaf(leaf, files, sharding, shape.dtype)

  variables = jax.tree_util.tree_map_with_path(load_one, shapes, shardings)
  if files.nonfinite and not allow_nonfinite:
    raise ProblemsError(
      f'{checkpoint.folder} has weights that are not finite, with which no run '
      'can begin (interop.load reads them with allow_nonfinite=True)',
      [f'{name}: {n} values' for name, n in sorted(files.nonfinite.items())],
    )
  return variables


def _check_keys(checkpoint: Checkpoint, files: TensorFiles) -> None:
  """Refuses a size in config.json above the number of all tensors' values.

  A damaged config.json is so refused before a huge model is built.
  """
  num_values = files.num_values
  problems = [
    f'{name}={checkpoint.config[name]}'
    for name, (kind, *_) in checkpoint.architecture.keys.honoured.items()
    if kind in (SIZE, OPTIONAL_SIZE)
    and (checkpoint.config.get(name) or 0) > num_values
  ]
  if problems:
    raise InputError(
      f'{checkpoint.folder}: config.json has {", ".join(problems)}, more than '
      f'the {num_values} values of all tensors'
    )


def _checked_leaves(
  checkpoint: Checkpoint, model: Model, shapes: Any, files: TensorFiles
) -> dict[str, Leaf]:
  """The tensors of every variable, by path, checked against the files.

  `shapes` has the shapes of the model's variables, by collection.

  Raises:
    ValueError: Tensors are missing, unknown or of another shape; all are
      listed.
  """
  architecture, names = checkpoint.architecture, checkpoint.architecture.names
  prefix = architecture.prefix
  if prefix and not any(name.startswith(prefix) for name in files.specs):
    names = without_prefix(names, prefix)
  patterns = (*architecture.computed_tensors, *checkpoint.skipped_tensors)
  if model.embedding.encoder_table:
    table_name = re.escape(names['embedding'][0].template)
    patterns, names = (*patterns, f'^{table_name}$'), with_encoder_table(names)
  our_leaves = leaves(names, model, shapes, list(files.specs))
  problems = check(our_leaves, files, copies(names, our_leaves), patterns)
  if problems:
    raise ProblemsError(
      f'{checkpoint.folder} does not hold the {architecture.model_type} model '
      'that its config.json describes',
      problems,
    )
  return {leaf.path: leaf for leaf in our_leaves}


def load_leaf(
  leaf: Leaf, files: TensorFiles, sharding: Sharding, dtype: Any
) -> jax.Array:
  """One sharded variable; only the slices that devices keep are read.

  A shard of one tensor goes to its device as it was read. A shard of several
  tensors is assembled on the host if it is not larger than the checkpoint's
  largest tensor, or else on its device, tensor by tensor.
  """
  index_by_device = sharding.addressable_devices_indices_map(leaf.shape)
  by_bounds: dict[tuple, list[jax.Device]] = {}
  for device, index in index_by_device.items():
    bounds = tuple(
      part.indices(size)[:2] for part, size in zip(index or (), leaf.shape)
    )
    by_bounds.setdefault(bounds, []).append(device)
  arrays = {}
  for bounds, devices in by_bounds.items():
    index = tuple(slice(*pair) for pair in bounds)
    shard = _shard(leaf, files, index, np.dtype(dtype), devices[0])
    arrays |= {device: jax.device_put(shard, device) for device in devices}
  return jax.make_array_from_single_device_arrays(
    leaf.shape, sharding, [arrays[device] for device in index_by_device]
  )


def _shard(leaf, files, index, dtype, device) -> jax.Array:
  shape = tuple(part.stop - part.start for part in index)
  arrays = (
    (start, piece[(None,) * len(start)].astype(dtype, copy=False))
    for start, piece in _pieces(leaf, files, index)
  )
  # Each copy to a device is waited for: otherwise several tensors would be in
  # host memory at once.
  if math.prod(shape[: leaf.num_stacked]) == 1:
    ((_, shard),) = arrays
    return jax.block_until_ready(jax.device_put(shard, device))
  if math.prod(shape) * dtype.itemsize <= files.largest:
    shard = np.empty(shape, dtype)
    for start, piece in arrays:
      shard[start] = piece
    return jax.block_until_ready(jax.device_put(shard, device))
  with jax.default_device(device):
    shard = jax.numpy.zeros(shape, dtype)
    for start, piece in arrays:
      shard = jax.block_until_ready(_insert(shard, piece, start))
  return shard


def _pieces(leaf: Leaf, files: TensorFiles, index: Index):
  """Yields (start, array) for each tensor in one shard of a variable.

  The start has the tensor's leading indices (of layer and expert) within the
  shard, the array the tensor's values in the shard, in our layout; `index` has
  the shard's slice of each dimension of the variable.
  """
  num_stacked = leaf.num_stacked
  piece_index, piece_shape = index[num_stacked:], leaf.shape[num_stacked:]
  ranges = [range(part.start, part.stop) for part in index[:num_stacked]]
  for leading_index in itertools.product(*ranges):
    read_slice = functools.partial(files.read, leaf.tensors[leading_index])
    start = tuple(i - part.start for i, part in zip(leading_index, index))
    piece = leaf.form.read(read_slice, piece_shape, piece_index)
    files.note_nonfinite(leaf.tensors[leading_index], piece)
    yield start, piece


@functools.partial(jax.jit, donate_argnums=0)
def _insert(shard: jax.Array, piece: jax.Array, start) -> jax.Array:
  # Arrays are viewed as integers, since XLA's CPU compiler computes bfloat16 in
  # float32: every number of `shard` would be converted for each piece.
  bits = jax.numpy.dtype(f'uint{8 * shard.itemsize}')
  starts = (*start, *[0] * (shard.ndim - len(start)))
  new = jax.lax.dynamic_update_slice(shard.view(bits), piece.view(bits), starts)
  return new.view(shard.dtype)
