"""transformers' OLMoE (arXiv:2409.02060) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- Queries and keys are normed over all heads together, before they are split
  into heads, and clipped after that, as values are.
- Gates are probabilities among all experts. With `norm_topk_prob`, which the
  published checkpoints do not have, they are divided by their sum.
"""

from typing import Any

from moe_jax.interop import decoders
from moe_jax.interop.config_keys import OPTIONAL_POSITIVE, SIZE, Values
from moe_jax.interop.decoders import (
  BLOCK,
  ENDS,
  Table,
  decoder,
  experts,
  weight,
)
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

KEYS = decoders.keys(
  dict(
    vocab_size=50304,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    num_experts_per_tok=8,
    router_aux_loss_coef=0.01,
  ),
  honoured={
    'intermediate_size': (SIZE, 2048),
    'num_experts': (SIZE, 64),
    'norm_topk_prob': (bool, False),
    'clip_qkv': (OPTIONAL_POSITIVE, None),
    'attention_bias': (bool, False),
  },
  spellings={'num_local_experts': 'num_experts'},
)


def problems(c: Values) -> list[str]:
  """A text for each value that our decoders cannot express."""
  return [*decoders.problems(c), *decoders.gate_problems(c)]


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  return decoders.options(
    c,
    TokenChoice(gates=decoders.gates(c)),
    decoders.heads(
      c,
      qk_norm='all',
      qk_norm_epsilon=float(c.rms_norm_eps),
      clip=float(c.clip_qkv or 0),
    ),
  )


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  return decoders.describe(o, 'OLMoE', KEYS) | dict(
    norm_topk_prob=decoders.is_renormalized(o.moe.router),
    clip_qkv=decoders.plain_heads(o).clip or None,
  )


NAMES: Table = {
  **ENDS,
  **BLOCK,
  **weight('attention/query_norm', 'self_attn.q_norm', '(H D) -> H D'),
  **weight('attention/key_norm', 'self_attn.k_norm', '(N D) -> N D'),
  **weight('moe/router/w', 'mlp.gate', 'E M -> M E'),
  **experts(),
}
ARCHITECTURE = decoder(
  'olmoe', 'Olmoe', KEYS, problems, options, describe, NAMES
)
