"""A Hugging Face checkpoint: what it is, checked before anything is read.

Not here: where it comes from (`hub.py`), and its parameters (`loading.py`).
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections
from flax import linen as nn

from moe_jax import models
from moe_jax.config import unknown
from moe_jax.data.tokenizers import read_json
from moe_jax.interop import config_keys, mixtral, nllb_moe, switch_transformers
from moe_jax.interop.architecture import Architecture
from moe_jax.interop.model_section import SHARDING, section
from moe_jax.interop.tensor_files import FLOATS, listed

ARCHITECTURES = {
  module.ARCHITECTURE.model_type: module.ARCHITECTURE
  for module in (mixtral, nllb_moe, switch_transformers)
}
# Shapes depend on no length; a model is made before its rows are known.
_LENGTH = 8


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What config.json says.

  Attributes:
    folder: Where it is.
    architecture: Whose it is.
    config: The file's content.
    section: Our `model` section.
    notes: What acts in training alone and is not carried over, a line each.
    encoder_table: Whether the encoder has an embedding of its own, which no
      section says.
  """

  folder: pathlib.Path
  architecture: Architecture
  config: Mapping[str, Any]
  section: ml_collections.ConfigDict
  notes: tuple[str, ...]
  encoder_table: bool = False

  @property
  def model(self) -> nn.Module:
    """The model that the section describes."""
    return build(self.section, self.encoder_table)


def build(
  model: ml_collections.ConfigDict, encoder_table: bool = False
) -> nn.Module:
  """The model of a `model` section alone."""
  data = dict(seq_len=_LENGTH, target_len=_LENGTH)
  whole = dict(model=model, data=data, sharding=SHARDING)
  made = models.build(ml_collections.ConfigDict(whole))
  if not encoder_table:
    return made
  embedding = dataclasses.replace(made.config.embedding, encoder_table=True)
  return made.clone(
    config=dataclasses.replace(made.config, embedding=embedding)
  )


def open_checkpoint(folder: pathlib.Path, dtype: str = '') -> Checkpoint:
  """Reads and checks a folder's config.json.

  Args:
    folder: Of a checkpoint.
    dtype: Of parameters and products; '': as the checkpoint's own, float16 as
      float32, which holds its numbers.

  Raises:
    ValueError: The architecture, a key or a value is not supported; all that
      is wrong is listed.
  """
  path = folder / 'config.json'
  if not path.is_file():
    raise ValueError(f'{folder} has no config.json')
  config = read_json(path)
  settings, architecture, notes = _settings(config, path)
  stored = _dtype(config, path)
  dtype = dtype or ('float32' if stored == 'float16' else stored)
  settings = {**settings, 'dtype': dtype, 'param_dtype': dtype}
  model = section(settings)
  try:
    build(model)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  return Checkpoint(folder, architecture, config, model, tuple(notes))


def from_config(config: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The `model` section of a config.json's content, in float32.

  Raises:
    ValueError: As `open_checkpoint`.
  """
  return section(_settings(config, pathlib.Path('config.json'))[0])


def _settings(config, path):
  architecture = _architecture(config, path)
  values, problems, notes = config_keys.read(architecture.keys, config)
  settings, more = architecture.settings(values)
  if problems + more:
    raise ValueError(
      listed(
        f'{path}: this {architecture.model_type} checkpoint is not supported',
        problems + more,
      )
    )
  return settings, architecture, notes


def named(kind: Any, where: str = '') -> Architecture:
  """The architecture of a `model_type`.

  Raises:
    ValueError: It is not supported; those that are, are listed.
  """
  by_name = {name.replace('-', '_'): a for name, a in ARCHITECTURES.items()}
  if (name := str(kind).replace('-', '_')) not in by_name:
    raise unknown(f'model_type{where}', kind, ARCHITECTURES)
  return by_name[name]


def _architecture(config: Mapping[str, Any], path: pathlib.Path):
  architecture = named(config.get('model_type'), f' in {path}')
  for name in config.get('architectures') or []:
    if name not in architecture.classes:
      raise unknown(f'architecture in {path}', name, architecture.classes)
  return architecture


def _dtype(config: Mapping[str, Any], path: pathlib.Path) -> str:
  given = config.get('dtype') or config.get('torch_dtype') or 'float32'
  name = str(given).removeprefix('torch.')
  if name not in FLOATS:
    raise unknown(f'dtype in {path}', given, FLOATS)
  return name
