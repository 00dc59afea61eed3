"""transformers' Mixtral (arXiv:2401.04088) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- Positions count padding, too; only their differences matter.
- `sliding_window` includes the token itself.
- `head_dim` may differ from the width over the number of heads; gates are the
  chosen experts' probabilities, divided by their sum (`gates='renormalized'`).
- In memory, experts are fused (`gate_up_proj`); in files each has its own
  tensor. All names are read, and those of files are written.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.interop import decoders
from moe_jax.interop.config_keys import (
  OPTIONAL_LENGTH,
  OPTIONAL_SIZE,
  RATE,
  SIZE,
  Values,
)
from moe_jax.interop.decoders import BLOCK, ENDS, Table, decoder, experts, layer
from moe_jax.interop.mapping import Name
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

_THETA = 1e6
KEYS = decoders.keys(
  dict(
    vocab_size=32000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.001,
  ),
  honoured={
    'intermediate_size': (SIZE, 14336),
    'head_dim': (OPTIONAL_SIZE, None),
    'sliding_window': (OPTIONAL_LENGTH, None),
    'num_local_experts': (SIZE, 8),
  },
  training={
    'router_jitter_noise': (
      RATE,
      0.0,
      0.0,
      'it multiplies what the experts see too; see moe.jitter for the router',
    ),
  },
  spellings={'num_experts': 'num_local_experts'},
)


def problems(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from decoders.problems(c, theta=_THETA)
  yield from decoders.gate_problems(c)


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  return decoders.options(
    c,
    TokenChoice(gates='renormalized'),
    decoders.heads(c, window=c.sliding_window or 0),
    theta=_THETA,
  )


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  return decoders.describe(o, 'Mixtral', KEYS)


NAMES: Table = {
  **ENDS,
  **BLOCK,
  **layer(
    'moe/router/w',
    Name('block_sparse_moe.gate.weight', 'E M -> M E'),
    Name('mlp.gate.weight', 'E M -> M E'),
  ),
  **experts('block_sparse_moe.experts', 'w1', 'w3', 'w2'),
}
ARCHITECTURE = decoder(
  'mixtral', 'Mixtral', KEYS, problems, options, describe, NAMES
)
