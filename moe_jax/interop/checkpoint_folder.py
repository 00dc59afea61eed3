"""The folder of a checkpoint, local or from the hub, and its config.json."""

import dataclasses
import importlib
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import huggingface_hub

from moe_jax.config import unknown
from moe_jax.data import plain_files
from moe_jax.data.plain_files import plain, read_json
from moe_jax.errors import InputError
from moe_jax.interop import config_keys, tensor_files
from moe_jax.interop.architecture import Architecture
from moe_jax.models import ModelOptions

# Patterns of the files besides weights: configs, tokenizer, chat template.
SMALL = ('*.json', '*.jinja', '*.model', '*.txt')
_REPOSITORY = re.compile(r'[\w.-]+(/[\w.-]+)?')


def fetch_folder(
  source: str | os.PathLike[str], *, weights: bool = True, revision: str = ''
) -> pathlib.Path:
  """The folder `source`, or the hub's cache to which `source` is downloaded.

  If a repository has safetensors, PyTorch's files are not fetched. Without a
  network, files are taken from the cache.

  Args:
    source: A folder, or the id of a repository: 'google/switch-base-8'.
    weights: Whether weights are fetched, besides configs and tokenizer.
    revision: A branch, tag or commit; '' is the main branch.

  Raises:
    ValueError: The source is no folder, and no repository that the hub gives.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return folder
  name = str(source)
  if folder.exists() or not _REPOSITORY.fullmatch(name):
    raise InputError(f'{name} is no folder, and no id of a hub repository')
  if not weights:
    return _download(name, revision, [])
  for file in (tensor_files.SAFETENSORS, tensor_files.TORCH):
    stem, _, ending = file.partition('.')
    patterns = [file, f'{stem}-*.{ending}']  # one file, or shards
    folder = _download(name, revision, patterns)
    if any(path for pattern in patterns for path in folder.glob(pattern)):
      break
  return folder


def small_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a checkpoint besides weights and their index.

  Raises:
    ValueError: A file is a link out of the folder, a pipe or the like.
  """
  files = plain_files.matching(folder, SMALL)
  return [path for path in files if not path.name.endswith('.index.json')]


def _download(name: str, revision: str, patterns: list[str]) -> pathlib.Path:
  try:
    folder = huggingface_hub.snapshot_download(
      name, revision=revision or None, allow_patterns=[*SMALL, *patterns]
    )
  except Exception as error:  # of the client, of HTTP or of the network
    raise InputError(
      f'{name} is no folder in {os.getcwd()}, and the hub does not give it: '
      f'{plain_files.first_line(error)}'
    ) from error
  return pathlib.Path(folder)


# The modules of all families, in the order in which an export tries their
# architectures.
_FAMILIES = (
  'mixtral',
  'deepseek',
  'gpt_oss',
  'granitemoe',
  'nllb_moe',
  'olmoe',
  'phimoe',
  'qwen_moe',
  'switch_transformers',
  'openmoe',
)
ARCHITECTURES: Mapping[str, Architecture] = {
  a.model_type: a
  for name in _FAMILIES
  for a in importlib.import_module(f'moe_jax.interop.{name}').ARCHITECTURES
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint whose config.json has been read.

  Attributes:
    folder: The folder of the checkpoint.
    architecture: The architecture of the checkpoint.
    config: The content of config.json.
    options: The options of the model.
    notes: A line for each value of `config` that acts only in training and that
      `options` cannot express.
    skipped_tensors: Regular expressions; a tensor is not read if one of them
      matches a part of the tensor's name.
  """

  folder: pathlib.Path
  architecture: Architecture
  config: Mapping[str, Any]
  options: ModelOptions
  notes: tuple[str, ...]
  skipped_tensors: tuple[str, ...] = ()

  def open_files(self) -> tensor_files.TensorFiles:
    """Opens the files with the checkpoint's tensors."""
    return self.architecture.files(self.folder)


def open_checkpoint(folder: pathlib.Path, dtype: str = '') -> Checkpoint:
  """Reads and checks a folder's config.json.

  Args:
    folder: The folder of a checkpoint.
    dtype: Dtype of parameters and matrix products; '' is the dtype that
      config.json names, or float32 if that is float16 or missing.

  Raises:
    ValueError: The architecture, a key or a value is not supported; all
      problems are listed.
  """
  path = folder / 'config.json'
  if plain(folder, path.name) is None:
    raise InputError(f'{folder} has no config.json')
  config = read_json(path)
  checkpoint = _read_checkpoint(config, path)
  dtype = dtype or param_dtype_for(_dtype(config, path))
  options: Any = checkpoint.options
  numerics = dataclasses.replace(
    options.numerics, dtype=dtype, param_dtype=dtype
  )
  options = dataclasses.replace(options, numerics=numerics)
  return dataclasses.replace(checkpoint, options=options)


def from_config(config: Mapping[str, Any]) -> ModelOptions:
  """The options of the model that the content of a config.json describes.

  No file is read. The model is in float32, whatever dtype the content names.

  Raises:
    ValueError: The architecture, a key or a value is not supported.
  """
  path = pathlib.Path('config.json')
  return _read_checkpoint(config, path, 'what would be written there').options


def _read_checkpoint(
  config: Mapping[str, Any], path: pathlib.Path, subject: str = ''
) -> Checkpoint:
  architecture = architecture_of(config, f' in {path}')
  classes = config.get('architectures') or []
  if not isinstance(classes, list):
    raise InputError(f'{path}: architectures={classes!r} is no list of names')
  for name in classes:
    if name not in architecture.classes:
      raise unknown(f'architecture in {path}', name, architecture.classes)
  subject = subject or f'this {architecture.model_type} checkpoint'
  values, problems, notes = config_keys.read(architecture.keys, config)
  problems += config_keys.bad_ids(config, values.vocab_size)
  problems += architecture.problems(values)
  if problems:
    raise tensor_files.ProblemsError(
      f'{path}: {subject} is not supported', problems
    )
  try:
    return Checkpoint(
      path.parent,
      architecture,
      config,
      architecture.options(values),
      tuple(notes),
      architecture.skipped_tensors(values),
    )
  except InputError as error:
    raise InputError(f'{path}: {error}') from error


def architecture_of(
  config: Mapping[str, Any], location: str = ''
) -> Architecture:
  """The architecture that `architectures` and `model_type` of a config name.

  Raises:
    ValueError: The architecture is not supported; the message, in which
      `location` follows 'model_type', lists those that are.
  """
  model_type, classes = config.get('model_type'), config.get('architectures')
  for architecture in ARCHITECTURES.values():
    borrowed_type = architecture.borrowed_type
    names = classes if isinstance(classes, list) and borrowed_type else []
    has_class = any(name in architecture.classes for name in names)
    if has_class and model_type in (borrowed_type, None):
      return architecture
  by_name = {name.replace('-', '_'): a for name, a in ARCHITECTURES.items()}
  if (name := str(model_type).replace('-', '_')) not in by_name:
    borrowed = (
      f'{a.borrowed_type} of class {a.classes[0]}'
      for a in ARCHITECTURES.values()
      if a.borrowed_type
    )
    raise unknown(
      f'model_type{location}', model_type, [*ARCHITECTURES, *borrowed]
    )
  return by_name[name]


def param_dtype_for(stored_dtype: str) -> str:
  """The dtype of parameters that are stored in some dtype.

  Parameters that are stored as float16 become float32; other dtypes stay.
  """
  return 'float32' if stored_dtype == 'float16' else stored_dtype


def named_dtype(config: Mapping[str, Any]) -> Any:
  """The dtype that a config.json names, unchecked; None if it names none."""
  return config.get('dtype') or config.get('torch_dtype')


def _dtype(config: Mapping[str, Any], path: pathlib.Path) -> str:
  dtype = named_dtype(config) or 'float32'
  name = str(dtype).removeprefix('torch.')
  if name not in tensor_files.FLOATS:
    raise unknown(f'dtype in {path}', dtype, tensor_files.FLOATS)
  return name
