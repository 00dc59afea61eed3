"""Linen modules and their options: routers, experts, MoE, attention, block."""

from moe_jax.layers.activations import ACTIVATIONS
from moe_jax.layers.attention import (
  ATTENTIONS,
  Attention,
  AttentionOptions,
  LatentAttention,
  LatentOptions,
)
from moe_jax.layers.block import Block, BlockConfig, Context
from moe_jax.layers.experts import (
  DISPATCHES,
  EXPERTS,
  Dispatch,
  Dropless,
  Einsum,
  ExpertOptions,
  FeedForwardExpert,
  Gather,
  ModuleExpert,
  SharedExpertOptions,
  Sorted,
)
from moe_jax.layers.ffn import FeedForward, FfnOptions
from moe_jax.layers.lstm import Lstm, LstmOptions
from moe_jax.layers.moe import MoE
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.norms import NORMS, LayerNorm, Norm, RmsNorm
from moe_jax.layers.positions import (
  POSITIONS,
  Learned,
  NoPositions,
  Positions,
  Relative,
  Rotary,
  Sinusoidal,
)
from moe_jax.layers.rotary_scaling import SCALINGS, LongRope, Yarn
from moe_jax.layers.shared import INITS, FanIn, Gpt2, Init, Numerics, Shared

__all__ = [
  'ACTIVATIONS',
  'ATTENTIONS',
  'DISPATCHES',
  'EXPERTS',
  'INITS',
  'NORMS',
  'POSITIONS',
  'SCALINGS',
  'Attention',
  'AttentionOptions',
  'Block',
  'BlockConfig',
  'Context',
  'Dispatch',
  'Dropless',
  'Einsum',
  'ExpertOptions',
  'FanIn',
  'FeedForward',
  'FeedForwardExpert',
  'FfnOptions',
  'Gather',
  'Gpt2',
  'Init',
  'LatentAttention',
  'LatentOptions',
  'LayerNorm',
  'Learned',
  'LongRope',
  'Lstm',
  'LstmOptions',
  'MoE',
  'ModuleExpert',
  'MoeOptions',
  'NoPositions',
  'Norm',
  'Numerics',
  'Positions',
  'Relative',
  'RmsNorm',
  'Rotary',
  'Shared',
  'SharedExpertOptions',
  'Sinusoidal',
  'Sorted',
  'Yarn',
]
