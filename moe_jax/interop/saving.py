"""Writing of a model and its variables as a folder for transformers."""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from moe_jax.errors import InputError
from moe_jax.interop.architecture import Architecture
from moe_jax.interop.exported_config import choose
from moe_jax.interop.mapping import Leaf, Names, leaves, path_in_collection
from moe_jax.interop.tensor_files import SAFETENSORS
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models import ModelOptions
from moe_jax.models.expert_arrays import has_merged, with_copies
from moe_jax.models.trees import variables as as_variables

_SHARD_BYTES = 2**31


def save(
  options: ModelOptions,
  variables: Mapping[str, Any],
  path: str | os.PathLike[str],
  *,
  config: Mapping[str, Any] | None = None,
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes config.json and safetensors that `from_pretrained` reads.

  Every variable keeps its own dtype. The host holds the tensors of one file at
  a time. A merged expert is written once for each column of its router that
  leads to it.

  Args:
    options: The options of a decoder or an encoder-decoder.
    variables: The model's parameters, as `{'params': ...}`, and 'router_state'
      if the model keeps a balancing bias.
    path: A folder that is new or empty.
    config: Further keys of config.json, such as special ids, or an imported
      checkpoint's whole config.json. Keys that the model decides override them.
    shard_bytes: The most bytes of all tensors in a file, except for a single
      larger tensor.

  Raises:
    ValueError: transformers has no such model (everything that transformers
      cannot express is listed); the state of routers is missing; or the folder
      is not empty.
  """
  folder = pathlib.Path(path).expanduser()
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f'{folder} is there already; give a new or empty folder')
  stacks = options.build().stacks
  if stacks.keeps_router_state and not variables.get(ROUTER_STATE):
    raise InputError(
      f'the routers keep a balancing bias, and the variables {[*variables]} '
      f'have no {ROUTER_STATE!r}'
    )
  if has_merged(options.build()):
    options, variables = with_copies(options, variables)
  params, state = variables['params'], variables.get(ROUTER_STATE, {})
  architecture, config_json = choose(options, config or {})
  model = options.build()
  exported = as_variables(params, state)
  our_leaves = leaves(architecture.names, model, exported)
  tensors = _tensors(our_leaves, architecture, exported)
  folder.mkdir(parents=True, exist_ok=True)
  _write(folder, tensors, shard_bytes)
  # config.json is written last, since a folder without it is not read.
  text = json.dumps(config_json, indent=2, sort_keys=True)
  (folder / 'config.json').write_text(text + '\n', encoding='utf-8')


class _Part(NamedTuple):
  """The part of a variable that a tensor holds.

  Attributes:
    array: The variable.
    leaf: The tensors of the variable.
    index: The leading indices of the part, of a layer and an expert.
  """

  array: jax.Array
  leaf: Leaf
  index: tuple[int, ...]

  def fetch(self) -> np.ndarray:
    """Copies the part to the host."""
    part = _take(self.array, self.index) if self.index else self.array
    return np.asarray(part)


def _tensors(
  our_leaves: Sequence[Leaf], architecture: Architecture, variables: Any
) -> dict[str, list[_Part]]:
  """The parts of each tensor that is written, by its name."""
  arrays = {
    path_in_collection(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
  }
  names_by_table = _table_names(architecture.names, arrays)
  parts_of_tensor: dict[str, list[_Part]] = {}
  for leaf in our_leaves:
    for index, name in leaf.tensors.items():
      for tensor in names_by_table.get(leaf.path, [name]):
        part = _Part(arrays[leaf.path], leaf, index)
        parts_of_tensor.setdefault(tensor, []).append(part)
  for name, parts in parts_of_tensor.items():
    num_blocks = parts[0].leaf.form.num_blocks
    if len(parts) != num_blocks:
      paths = [part.leaf.path for part in parts]
      raise InputError(
        f'{name} is made of {num_blocks} parameters, not of {paths}'
      )
  return parts_of_tensor


def _table_names(
  names: Names, arrays: Mapping[str, Any]
) -> dict[str, list[str]]:
  """The names of tensors that each embedding table is written to, by table.

  The result is {} if logits are tied. Otherwise transformers has a table for
  the encoder and a table for the decoder. A third table, the shared one, exists
  but is not read; it is written as a copy of the decoder's.
  """
  if 'w_logits' not in arrays:
    return {}
  all_tables = [name.template for name in names['embedding']]
  if 'encoder_embedding' not in arrays:
    return {'embedding': all_tables}
  encoder_tables = [name.template for name in names['encoder_embedding']]
  decoder_tables = [name for name in all_tables if name not in encoder_tables]
  return {'embedding': decoder_tables, 'encoder_embedding': encoder_tables}


def _dtype(parts: Sequence[_Part]) -> np.dtype:
  return np.result_type(*(part.array.dtype for part in parts))


def _assemble(parts: Sequence[_Part]) -> np.ndarray:
  """The tensor that is made of the parts, each of which is a block of it."""
  tensor = np.empty(parts[0].leaf.tensor_shape, _dtype(parts))
  for part in parts:
    part.leaf.form.write(tensor, part.fetch())
  return tensor


@jax.jit
def _take(array: jax.Array, index: tuple[Any, ...]) -> jax.Array:
  """array[index], computed by one compiled program for all indices."""
  for i in index:
    array = jax.lax.dynamic_index_in_dim(array, i, 0, keepdims=False)
  return array


def _write(
  folder: pathlib.Path,
  tensors: Mapping[str, Sequence[_Part]],
  shard_bytes: int,
) -> None:
  """Writes one file of tensors, or several files and an index."""
  shards: list[list[str]] = [[]]
  size = total_size = 0
  for name, parts in sorted(tensors.items()):
    num_bytes = math.prod(parts[0].leaf.tensor_shape) * _dtype(parts).itemsize
    if shards[-1] and size + num_bytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size, total_size = size + num_bytes, total_size + num_bytes
  stem, _, ending = SAFETENSORS.partition('.')
  weight_map = {}
  for i, shard in enumerate(shards, start=1):
    file = SAFETENSORS
    if len(shards) > 1:
      file = f'{stem}-{i:05}-of-{len(shards):05}.{ending}'
    arrays = {name: _assemble(tensors[name]) for name in shard}
    save_file(arrays, folder / file, metadata={'format': 'pt'})
    weight_map |= dict.fromkeys(arrays, file)
  if len(shards) > 1:
    index = {
      'metadata': {'total_size': total_size},
      'weight_map': weight_map,
    }
    text = json.dumps(index, indent=2, sort_keys=True)
    (folder / f'{SAFETENSORS}.index.json').write_text(text + '\n')
