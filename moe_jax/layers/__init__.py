"""Linen modules and their options: routers, experts, MoE, attention, block."""

from moe_jax.layers.attention import (
  Attention,
  AttentionOptions,
  LatentAttention,
  LatentOptions,
)
from moe_jax.layers.experts import (
  DISPATCHES,
  EXPERTS,
  Dropless,
  Einsum,
  ExpertOptions,
  FeedForwardExpert,
  Gather,
  ModuleExpert,
  SharedExpertOptions,
  Sorted,
)
from moe_jax.layers.ffn import ACTIVATIONS, FeedForward, FfnOptions
from moe_jax.layers.lstm import Lstm, LstmOptions
from moe_jax.layers.moe import MoE
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.positions import Rotary
from moe_jax.layers.rotary import Yarn
from moe_jax.layers.shared import FanIn, Gpt2, Numerics, Shared

__all__ = [
  'ACTIVATIONS',
  'DISPATCHES',
  'EXPERTS',
  'Attention',
  'AttentionOptions',
  'Dropless',
  'Einsum',
  'ExpertOptions',
  'FanIn',
  'FeedForward',
  'FeedForwardExpert',
  'FfnOptions',
  'Gather',
  'Gpt2',
  'LatentAttention',
  'LatentOptions',
  'Lstm',
  'LstmOptions',
  'MoE',
  'ModuleExpert',
  'MoeOptions',
  'Numerics',
  'Rotary',
  'Shared',
  'SharedExpertOptions',
  'Sorted',
  'Yarn',
]
