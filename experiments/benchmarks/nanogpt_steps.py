"""A training step of nanoGPT's model in plain PyTorch, as a peer of ours.

The model of https://github.com/karpathy/nanoGPT at the size of its CPU recipe,
`configs/shakespeare_dense.py`: blocks with the norms first, GELU, learned
positions, tied embeddings and no biases; PyTorch's fused attention and AdamW.
Random characters, since a dense step costs the same whatever the text is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from moe_jax.cli import load_config
from moe_jax.config import layered
from moe_jax.run_config import RunConfig

CONFIG, SPARSE = 'configs/shakespeare_dense.py', 'configs/shakespeare_switch.py'
NAME = 'PyTorch'
LIBRARIES = ('torch',)
ABOUT = (
  "# A training step of `shakespeare_dense` against nanoGPT's in PyTorch",
  'M=128, F=512, 4 layers, 12 rows of 64 characters, float32: forward, '
  "backward, clipping, AdamW; PyTorch's step in a process of its own.",
)
_CHARACTERS = 65  # number of different characters in tiny Shakespeare


def config() -> ml_collections.ConfigDict:
  """Config of our dense step, with the vocabulary of tiny Shakespeare."""
  changes = {'model': {'vocab_size': _CHARACTERS}}
  return layered(RunConfig, load_config(CONFIG), changes)


def cases() -> dict[str, Mapping[str, Any]]:
  """Overrides of the config's `model` by name of our case."""
  sparse = load_config(SPARSE).model.moe.to_dict()
  return {'shakespeare_dense': {}, 'shakespeare_switch': {'moe': sparse}}


def nanogpt_model(options: RunConfig) -> Any:
  """nanoGPT's model of our model's sizes, not trained.

  Called with characters int64 [B, T] it gives logits [B, T, V].
  """
  import torch
  from torch import nn

  m, T = options.model, options.data.seq_len
  M, H = m.width, m.attention.num_heads
  torch.manual_seed(0)

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norms = nn.ModuleList(nn.LayerNorm(M, bias=False) for _ in range(2))
      self.qkv = nn.Linear(M, 3 * M, bias=False)
      self.out = nn.Linear(M, M, bias=False)
      self.ffn = nn.Sequential(
        nn.Linear(M, m.ffn.hidden, bias=False),
        nn.GELU(),
        nn.Linear(m.ffn.hidden, M, bias=False),
      )

    def forward(self, x):
      B, T, M = x.shape
      qkv = self.qkv(self.norms[0](x)).split(M, dim=2)
      heads = (part.view(B, T, H, M // H).transpose(1, 2) for part in qkv)
      attend = nn.functional.scaled_dot_product_attention
      y = attend(*heads, is_causal=True).transpose(1, 2).reshape(B, T, M)
      x = x + self.out(y)
      return x + self.ffn(self.norms[1](x))

  class NanoGpt(nn.Module):
    def __init__(self):
      super().__init__()
      self.tokens = nn.Embedding(m.vocab_size, M)
      self.positions = nn.Embedding(T, M)
      self.blocks = nn.Sequential(*(Block() for _ in range(m.num_layers)))
      self.norm = nn.LayerNorm(M, bias=False)
      for name, p in self.named_parameters():
        if 'norm' not in name:
          nn.init.normal_(p, std=0.02)

    def forward(self, tokens):
      x = self.tokens(tokens) + self.positions(torch.arange(T))
      return self.norm(self.blocks(x)) @ self.tokens.weight.T

  return NanoGpt()


def programs(
  options: RunConfig, batch: Mapping[str, np.ndarray]
) -> dict[str, Callable[[], None]]:
  """The step of nanoGPT's model, by its name."""
  import torch

  model, o = nanogpt_model(options), options.optimizer
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=o.learning_rate,
    betas=(o.b1, o.b2),
    weight_decay=o.weight_decay,
    fused=True,
  )
  tokens, targets = (
    torch.from_numpy(np.asarray(batch[name])).long()
    for name in ('tokens', 'targets')
  )

  def run():
    optimizer.zero_grad(set_to_none=True)
    logits = model(tokens)
    torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), targets.flatten()
    ).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
    optimizer.step()

  return {NAME: run}
