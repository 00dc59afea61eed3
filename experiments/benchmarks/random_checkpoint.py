"""Folders of random checkpoints of any size, in bfloat16.

The model is a Qwen3-MoE with a tensor for each expert's kernel, in several
files of safetensors.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from moe_jax.interop.checkpoint_folder import open_checkpoint
from moe_jax.interop.mapping import leaves
from moe_jax.interop.tensor_files import SAFETENSORS
from moe_jax.models import describe

# All that does not grow with the number of layers has about 0.3 GB.
BASE: Mapping[str, Any] = dict(
  model_type='qwen3_moe',
  architectures=['Qwen3MoeForCausalLM'],
  dtype='bfloat16',
  vocab_size=32768,
  hidden_size=2048,
  num_attention_heads=16,
  num_key_value_heads=4,
  head_dim=128,
  intermediate_size=4096,
  num_experts=64,
  num_experts_per_tok=8,
  norm_topk_prob=True,
  tie_word_embeddings=False,
)
TINY: Mapping[str, Any] = dict(
  BASE,
  vocab_size=64,
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=6,
  num_experts=8,
  num_experts_per_tok=2,
  moe_intermediate_size=16,
)
_LAYER_BYTES = 8e8
_WIDTHS = 16  # experts' widths are multiples of this
# All bits but the highest of the exponent: the value is below 2, and finite.
_FINITE = np.uint64(0xBFFF_BFFF_BFFF_BFFF)


@dataclasses.dataclass(frozen=True)
class Written:
  """The sizes of a checkpoint that was written, and its digest.

  Attributes:
    total: The size of all tensors in bytes.
    largest_file: The size of the largest file's tensors in bytes.
    files: The number of files.
    digest: The sum of all values' bits, modulo 2**64.
  """

  total: int
  largest_file: int
  files: int
  digest: int


def config_of(num_bytes: float) -> dict[str, Any]:
  """The config.json of a model of about that many bytes, in whole layers."""
  layers = max(round(num_bytes / _LAYER_BYTES), 1)
  c = dict(BASE, num_hidden_layers=layers)
  M, D = c['hidden_size'], c['head_dim']
  heads = 2 * (c['num_attention_heads'] + c['num_key_value_heads'])
  rest = 2 * c['vocab_size'] * M + layers * M * (heads * D + c['num_experts'])
  expert = (num_bytes / 2 - rest) / layers / c['num_experts']
  width = _WIDTHS * max(round(expert / (3 * M * _WIDTHS)), 1)
  return dict(c, moe_intermediate_size=width)


def write(
  folder: pathlib.Path,
  config: Mapping[str, Any],
  file_bytes: float,
  seed: int = 0,
) -> Written:
  """Writes config.json, an index, and files of at most `file_bytes` each.

  The host holds the tensors of one file.
  """
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config, indent=2))
  shapes = tensor_shapes(folder)
  split = split_state_dict_into_shards_factory(
    shapes,
    get_storage_size=lambda shape: 2 * math.prod(shape),
    filename_pattern=SAFETENSORS.replace('.', '{suffix}.'),
    max_shard_size=int(file_bytes),
  )
  random, sizes, digest = np.random.default_rng(seed), [], 0
  for name, keys in split.filename_to_tensors.items():
    tensors = {key: _drawn(random, shapes[key]) for key in keys}
    save_file(tensors, folder / name, metadata={'format': 'pt'})
    sizes.append(sum(x.nbytes for x in tensors.values()))
    digest += sum(digest_of(x) for x in tensors.values())
  index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
  (folder / f'{SAFETENSORS}.index.json').write_text(json.dumps(index))
  return Written(sum(sizes), max(sizes), len(sizes), digest % 2**64)


def tensor_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor of the model of a folder's config.json."""
  checkpoint = open_checkpoint(folder)
  model = checkpoint.options.build()
  variables = {'params': describe(model).shapes}
  return {
    tensor: leaf.tensor_shape
    for leaf in leaves(checkpoint.architecture.names, model, variables)
    for tensor in leaf.tensors.values()
  }


def digest_of(array: np.ndarray) -> int:
  """The sum of the bits of an array's bfloat16 values, modulo 2**64."""
  bits = np.asarray(array, ml_dtypes.bfloat16).view(np.uint16)
  return int(bits.sum(dtype=np.uint64))


def _drawn(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  count = math.prod(shape)
  bits = random.integers(2**64, size=-(-count // 4), dtype=np.uint64) & _FINITE
  drawn = bits.view(np.uint16)[:count].view(ml_dtypes.bfloat16)
  return drawn.reshape(shape)
