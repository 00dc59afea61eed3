"""Experts, and the dispatches that move tokens to them and multiply.

See `serving.py` for the contracts. Each way of serving tokens has one file:
slots, sorted rows, few tokens.
"""

from moe_jax.config import Kinds
from moe_jax.layers.experts.quantized_experts import QuantizedExpert
from moe_jax.layers.experts.serving import (
  Dispatch,
  ExpertOptions,
  Experts,
  FeedForwardExpert,
)
from moe_jax.layers.experts.shared_expert import SharedExpertOptions
from moe_jax.layers.experts.slots import (
  Einsum,
  Gather,
  ModuleExpert,
)
from moe_jax.layers.experts.sorted_rows_experts import Dropless, Sorted

EXPERTS = Kinds(
  'expert',
  ExpertOptions,
  {'feed_forward': FeedForwardExpert, 'quantized': QuantizedExpert},
  inline=True,
)
DISPATCHES = Kinds(
  'dispatch',
  Dispatch,
  {'gather': Gather, 'einsum': Einsum, 'dropless': Dropless, 'sorted': Sorted},
)

__all__ = [
  'DISPATCHES',
  'EXPERTS',
  'Dispatch',
  'Dropless',
  'Einsum',
  'ExpertOptions',
  'Experts',
  'FeedForwardExpert',
  'Gather',
  'ModuleExpert',
  'QuantizedExpert',
  'SharedExpertOptions',
  'Sorted',
]
