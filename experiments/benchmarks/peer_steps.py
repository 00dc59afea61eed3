"""A training step in transformers equal to ours, for `bench_train_step --peer`.

The model is a Switch encoder-decoder of 4 + 4 layers, two sparse ones in each
half, on random tokens in float32. A step is forward pass, router losses,
backward pass and AdamW.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from experiments.benchmarks.train_step_programs import prepared, random_batch
from moe_jax.cli import load_config
from moe_jax.config import layered
from moe_jax.run_config import RunConfig

CONFIG = 'configs/switch_base.py'
NAME = 'transformers'
HEADING = "# A Switch encoder-decoder's training step against transformers'"
ABOUT = (
  'M=256, F=1024, 4 + 4 layers, two sparse in each, E=8, 8 examples of 256 '
  'tokens in and 64 out, float32: forward, router losses, backward, clipping, '
  "AdamW; transformers' step in a process of its own."
)
# Overrides of the config, the sizes of both models: M=256, F=1024, E=8, batches
# of 8 examples with 256 input and 64 output tokens.
SIZES = {
  'batch_size': 8,
  'microbatches': 1,
  'data': {'seq_len': 256, 'target_len': 64},
  'optimizer': {
    'kind': 'adamw',
    # The rate is so small that routing stays as it begins: at a rate that
    # learns, a few steps on one batch leave every token of a layer to one
    # expert, and PyTorch's optimizer passes over those without a gradient.
    'learning_rate': 1e-8,
    'schedule': {'kind': 'constant'},
    'b1': 0.9,
    'clip_norm': 1.0,
  },
  'model': {
    'vocab_size': 1024,
    'num_layers': 4,
    'width': 256,
    'attention': {'num_heads': 4, 'head_width': 64},
    'ffn': {'hidden': 1024},
    'dropout': 0.0,
    'numerics': {'dtype': 'float32'},
    'remat': 'none',
    'scan_layers': False,
    'moe': {
      'num_experts': 8,
      'layers': '1,3',
      'group_size': 0,
      'router': {'token_choice': {'jitter': 0.0}},
      'expert': {'dropout': 0.0},
    },
  },
}


def config() -> ml_collections.ConfigDict:
  """Config of our step: Switch-Base, shrunk to `SIZES`."""
  return layered(RunConfig, load_config(CONFIG), SIZES)


def cases() -> dict[str, Mapping[str, Any]]:
  """Overrides of the config's `model` by name of our case."""
  dropless = {'dispatch': {'kind': 'dropless'}, 'capacity': {'kind': 'all'}}
  return {
    'gather, capacity factor 1.25': {},
    # Dropped tokens save work here, and transformers drops none.
    'gather, capacity factor 1.0': {
      'moe': {'capacity': {'per_token': {'factor': 1.0}}}
    },
    'dropless': {'moe': dropless},
  }


def transformers_model(options: RunConfig) -> Any:
  """transformers' SwitchTransformers of our model's sizes, not trained."""
  import torch
  import transformers

  m = options.model
  heads = m.attention
  torch.manual_seed(0)
  return transformers.SwitchTransformersForConditionalGeneration(
    transformers.SwitchTransformersConfig(
      vocab_size=m.vocab_size,
      d_model=m.width,
      d_kv=heads.head_width,
      d_ff=m.ffn.hidden,
      num_layers=m.encoder_half.num_layers,
      num_decoder_layers=m.num_layers,
      num_sparse_encoder_layers=2,
      num_sparse_decoder_layers=2,
      num_heads=heads.num_heads,
      num_experts=m.moe.num_experts,
      expert_capacity=options.data.seq_len,  # drops nothing, at no cost
      router_jitter_noise=0.0,
      dropout_rate=0.0,
      dense_act_fn='relu',
      decoder_start_token_id=0,
    )
  )


def programs() -> dict[str, Callable[[], None]]:
  """A function that takes one step of transformers' model, by its name."""
  import torch

  options = prepared(config(), {})
  model, batch = transformers_model(options), random_batch(options)

  model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=options.optimizer.learning_rate, fused=True
  )
  names = ('encoder_tokens', 'tokens', 'targets')
  source, decoder_inputs, targets = (
    torch.from_numpy(np.asarray(batch[name])).long() for name in names
  )

  def run():
    optimizer.zero_grad(set_to_none=True)
    loss = model(
      input_ids=source,
      decoder_input_ids=decoder_inputs,
      labels=targets,
      output_router_logits=True,
    ).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(
      model.parameters(), options.optimizer.clip_norm
    )
    optimizer.step()

  return {NAME: run}
