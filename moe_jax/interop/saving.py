"""Writing of a model and its variables as a folder for transformers.

For its config.json an architecture of transformers is found that computes the
same function as the model. If there is none, the error says how the nearest
architecture differs.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from moe_jax.data.cache_folders import check_free
from moe_jax.errors import InputError
from moe_jax.finetuning.meaning import difference
from moe_jax.interop import checkpoint_folder
from moe_jax.interop.architecture import Architecture
from moe_jax.interop.mapping import Leaf, Names, leaves, path_in_collection
from moe_jax.interop.quirks import TransformersEncoderDecoder
from moe_jax.interop.tensor_files import SAFETENSORS, ProblemsError
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models import ModelOptions
from moe_jax.models.expert_arrays import has_merged, with_copies
from moe_jax.models.trees import variables as as_variables

# Keys of an imported config.json that an export leaves out: those that newer
# versions of transformers replace, and the key of quantized tensors.
_REPLACED_KEYS = (
  'torch_dtype',
  'rope_theta',
  'rope_scaling',
  'partial_rotary_factor',
  'original_max_position_embeddings',
  'quantization_config',
)
# For some options, the text that names the option in an error's message and
# says what it decides; other options are named alone.
_OPTION_TEXTS = {
  f'{half}sparse': f'{half}moe.layers, which layers are sparse'
  for half in ('', 'encoder.')
}
_HINT = (
  "'What can be exported' in moe_jax/interop/README.md has the flags of one "
  'that can be'
)
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
  check_free(folder)
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
    leaf: The names and the layout of the variable's tensors.
    index: The leading indices of the part, of a layer and an expert; () is all.
  """

  array: jax.Array
  leaf: Leaf
  index: tuple[int, ...]


def _tensors(
  our_leaves: Sequence[Leaf], architecture: Architecture, variables: Any
) -> dict[str, list[_Part]]:
  """The parts of variables that each written tensor is made of, by its name.

  `variables` are the model's by collection; `our_leaves` name their tensors.
  """
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
  """The names of tensors that each embedding table is written to, by its path.

  The result is {} if logits are tied. Otherwise transformers has a table for
  the encoder and a table for the decoder. A third table, the shared one, exists
  but is not read; it is written as a copy of the decoder's. `arrays` has the
  model's variables by path.
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
    array = _take(part.array, part.index) if part.index else part.array
    part.leaf.form.write(tensor, np.asarray(array))
  return tensor


@jax.jit
def _take(array: jax.Array, index: tuple[Any, ...]) -> jax.Array:
  """array[index], computed by one compiled program for all indices."""
  for i in index:
    array = jax.lax.dynamic_index_in_dim(array, i, 0, keepdims=False)
  return array


def _write(
  folder: pathlib.Path, tensors: Mapping[str, Sequence[_Part]], shard_bytes: int
) -> None:
  """Writes one file, or files of at most `shard_bytes` and an index."""

  def num_bytes(parts: Sequence[_Part]) -> int:
    return math.prod(parts[0].leaf.tensor_shape) * _dtype(parts).itemsize

  split = split_state_dict_into_shards_factory(
    dict(sorted(tensors.items())),
    get_storage_size=num_bytes,
    filename_pattern=SAFETENSORS.replace('.', '{suffix}.'),
    max_shard_size=shard_bytes,
  )
  for file, names in split.filename_to_tensors.items():
    arrays = {name: _assemble(tensors[name]) for name in names}
    save_file(arrays, folder / file, metadata={'format': 'pt'})
  if split.is_sharded:
    index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
    text = json.dumps(index, indent=2, sort_keys=True)
    (folder / f'{SAFETENSORS}.index.json').write_text(text + '\n')


def choose(
  options: ModelOptions, config: Mapping[str, Any]
) -> tuple[Architecture, dict[str, Any]]:
  """The architecture of a model, and the content of its config.json.

  `config` has further keys of config.json. The architecture is the one that
  they name, or else the first that computes the same function; architectures
  without a class in transformers are tried last.

  Raises:
    ValueError: No architecture computes the same function. The message lists
      how the architecture with the fewest differences differs, or, if none can
      be compared, why the first architecture cannot have the model.
  """
  if config.get('model_type') is not None:
    architecture = checkpoint_folder.architecture_of(config)
    return architecture, describe(options, architecture, config)
  errors = []
  for architecture in sorted(
    checkpoint_folder.ARCHITECTURES.values(), key=lambda a: a.needs_code
  ):
    if architecture.suits(options):
      try:
        return architecture, describe(options, architecture, config)
      except InputError as error:
        count = getattr(error, 'num_differences', math.inf)
        errors.append((architecture.needs_code, count, error))
  raise InputError(f'{min(errors, key=lambda e: e[:2])[2]}\n{_HINT}')


class _DiffersError(ProblemsError):
  """The nearest model of an architecture computes another function than ours.

  Attributes:
    num_differences: The number of options that differ. Options that our model
      lacks are not counted, since they follow from another choice that differs.
  """

  def __init__(
    self, model_type: str, differences: list[str], problems: list[str]
  ):
    absent = [line for line in differences if ': absent, not ' in line]
    self.num_differences = len(differences) - len(absent)
    super().__init__(
      f'transformers cannot compute this model as {model_type}; the model has',
      [*differences, *problems],
    )


def describe(
  options: ModelOptions, architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, Any]:
  """The content of config.json for a model, written as one of `architecture`.

  Keys of `config` are kept, unless the model decides or replaces them.

  Raises:
    ValueError: No model of the architecture computes the same function.
  """
  refusal = f'the model is no {architecture.model_type} model of transformers'
  counts = [moe.num_experts for moe in options.build().stacks.mixtures]
  if not counts:
    raise InputError(
      f'{refusal}: it is dense; {architecture.model_type} has experts'
    )
  if len(set(counts)) > 1:
    raise InputError(
      f'{refusal}: its sparse layers have {counts} experts, where transformers '
      'has one number for all; merge or prune with one number, --experts=N'
    )
  try:
    decided = architecture.describe(options)
  except InputError as error:
    raise InputError(f'{refusal}: {error}') from error
  replaced_keys = {*_REPLACED_KEYS, *architecture.keys.spellings}
  # Keys that act only in training get values without an effect, since our
  # models do not have their effects.
  neutral_values = {
    name: decided[neutral] if isinstance(neutral, str) else neutral
    for name, (_, _, neutral, _) in architecture.keys.training.items()
    if neutral is not ...
  }
  other_keys = {key: v for key, v in config.items() if key not in replaced_keys}
  config_json = {
    **neutral_values,
    **other_keys,
    **decided,
    'model_type': architecture.borrowed_type or architecture.model_type,
    'architectures': [architecture.classes[0]],
    'dtype': cast(Any, options).numerics.param_dtype,
  }
  theirs, problems = _read_back(config_json)
  if theirs is None:
    raise InputError(f'{refusal}: {"; ".join(problems)}')
  differences = _differences(options, theirs)
  if differences or problems:
    raise _DiffersError(architecture.model_type, differences, problems)
  return config_json


def _read_back(
  config_json: Mapping[str, Any],
) -> tuple[ModelOptions | None, list[str]]:
  """The options of the model that a config.json describes.

  Values that are not supported are replaced by defaults.

  Returns:
    The options, or None if config.json cannot be read with defaults either; and
    a text for each value that is not supported.
  """
  problems = []
  try:
    try:
      return checkpoint_folder.from_config(config_json), []
    except ProblemsError as error:
      problems = error.problems
      bad_keys = {problem.partition('=')[0] for problem in problems}
      kept = {k: v for k, v in config_json.items() if k not in bad_keys}
      return checkpoint_folder.from_config(kept), problems
  except InputError as error:
    return None, problems or [str(error)]


def _differences(ours: ModelOptions, theirs: ModelOptions) -> list[str]:
  """A line for each option by which two models compute different functions.

  `theirs` is the nearest of transformers; a line ends 'our value, not theirs'.
  """
  if ours.has_encoder:
    ours = TransformersEncoderDecoder.of(cast(Any, ours))
    # The tensors say if the encoder has an embedding table of its own, and
    # config.json does not, so that this is no difference.
    theirs = dataclasses.replace(theirs, encoder_table=ours.encoder_table)
    if not ours.build().stacks.capacity_binds:
      # If all tokens have slots, the slots that padding takes do not matter.
      theirs = dataclasses.replace(theirs, route_padding=ours.route_padding)
  pairs = difference(ours, theirs)
  # An option that `theirs` lacks is listed only if there is nothing else: it is
  # lacking because another option differs, such as the choice of a router.
  causes = {name: pair for name, pair in pairs.items() if pair[1] is not None}
  return [
    f'{_OPTION_TEXTS.get(name, name)}: '
    f'{"absent" if old is None else repr(old)}, not {new!r}'
    for name, (old, new) in (causes or pairs).items()
  ]
