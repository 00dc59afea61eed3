"""A small checkpoint of Mixtral in the files of transformers, made by hand."""

import functools
import json
import pathlib

import numpy as np
import tokenizers
from safetensors.numpy import save_file

CONFIG = dict(
  model_type='mixtral',
  vocab_size=11,
  hidden_size=8,
  intermediate_size=6,
  num_hidden_layers=1,
  num_attention_heads=2,
  num_key_value_heads=1,
  num_local_experts=3,
  num_experts_per_tok=2,
  eos_token_id=1,
)
_SHAPES = {
  'model.embed_tokens.weight': (11, 8),
  'lm_head.weight': (11, 8),
  'model.norm.weight': (8,),
  'model.layers.0.input_layernorm.weight': (8,),
  'model.layers.0.post_attention_layernorm.weight': (8,),
  'model.layers.0.self_attn.q_proj.weight': (8, 8),
  'model.layers.0.self_attn.k_proj.weight': (4, 8),
  'model.layers.0.self_attn.v_proj.weight': (4, 8),
  'model.layers.0.self_attn.o_proj.weight': (8, 8),
  'model.layers.0.block_sparse_moe.gate.weight': (3, 8),
}
for _expert in range(3):
  _name = f'model.layers.0.block_sparse_moe.experts.{_expert}'
  _SHAPES |= {f'{_name}.w1.weight': (6, 8), f'{_name}.w3.weight': (6, 8)}
  _SHAPES |= {f'{_name}.w2.weight': (8, 6)}
WEIGHTS = 'model.safetensors'


def tensors() -> dict[str, np.ndarray]:
  """Returns the weights, by name."""
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in _SHAPES.items()
  }


def write_config(folder: pathlib.Path, **changes) -> None:
  """Writes a config.json with changes; keys with the value ... are left out."""
  values = {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}
  (folder / 'config.json').write_text(json.dumps(values))


@functools.cache
def tokenizer_text(size: int = 11) -> str:
  """Returns a tokenizer.json of `size` words, the second of which is </s>."""
  names = ['a', '</s>', *(f'w{i}' for i in range(size - 2))]
  model = tokenizers.models.WordLevel(
    {name: i for i, name in enumerate(names)}, unk_token='a'
  )
  return tokenizers.Tokenizer(model).to_str()


def write(folder: pathlib.Path, **changes) -> pathlib.Path:
  """Writes the checkpoint, without a tokenizer; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  write_config(folder, **changes)
  save_file(tensors(), folder / WEIGHTS)
  return folder
