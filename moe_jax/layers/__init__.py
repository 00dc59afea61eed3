"""Linen modules: router, experts, MoE, feed-forward, attention, block."""

from moe_jax.layers.attention import Attention, AttentionConfig
from moe_jax.layers.block import Block
from moe_jax.layers.experts.slots import Experts
from moe_jax.layers.ffn import ACTIVATIONS, FeedForward, FfnConfig
from moe_jax.layers.initializers import Init
from moe_jax.layers.moe import MoE, MoeConfig
from moe_jax.layers.norms import NormConfig, make_norm
from moe_jax.layers.routers.router import Router
from moe_jax.layers.routers.router_config import RouterConfig

__all__ = [
  'ACTIVATIONS',
  'Attention',
  'AttentionConfig',
  'Block',
  'Experts',
  'FeedForward',
  'FfnConfig',
  'Init',
  'MoE',
  'MoeConfig',
  'NormConfig',
  'Router',
  'RouterConfig',
  'make_norm',
]
