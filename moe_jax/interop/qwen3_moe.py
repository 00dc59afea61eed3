"""transformers' Qwen3-MoE (arXiv:2505.09388) as a decoder.

No token is dropped. As transformers 5.24 computes it:

- Queries and keys are normed in each head, before they rotate. Heads may be
  wider than their share of the width.
- With `use_sliding_window` all layers attend to a window.
- Gates are probabilities among all experts, divided by their sum with
  `norm_topk_prob`, which the published checkpoints have.
"""

from typing import Any

from moe_jax.interop import decoder_keys, qwen_keys
from moe_jax.interop.architecture import decoder
from moe_jax.interop.config_keys import OPTIONAL_SIZE, SIZE, Values
from moe_jax.interop.decoder_names import (
  BLOCK,
  ENDS,
  Table,
  experts,
  gated_ffn,
  weight,
)
from moe_jax.layers.experts import FeedForwardExpert
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

KEYS = decoder_keys.keys(
  dict(
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    max_position_embeddings=32768,
    num_experts_per_tok=8,
    router_aux_loss_coef=0.001,
  ),
  honoured={
    **qwen_keys.HONOURED,
    'intermediate_size': (SIZE, 6144),
    'moe_intermediate_size': (SIZE, 768),
    'num_experts': (SIZE, 128),
    'head_dim': (OPTIONAL_SIZE, None),
    'attention_bias': (bool, False),
  },
  # The published Qwen3-Coder has these; transformers does not read them.
  fixed={
    'qkv_bias': (False,),
    'shared_expert_intermediate_size': (0, None),
    'use_qk_norm': (True,),
  },
  ignored={'max_window_layers': 'transformers does not read it'},
  spellings={'num_local_experts': 'num_experts'},
)


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  return decoder_keys.options(
    c,
    ffn_hidden=c.intermediate_size,
    num_experts=c.num_experts,
    router=TokenChoice(gates=decoder_keys.gates(c)),
    attention=decoder_keys.heads(
      c,
      head_width=c.head_dim or c.hidden_size // c.num_attention_heads,
      qk_norm='head',
      qk_norm_epsilon=float(c.rms_norm_eps),
      biases='all' if c.attention_bias else 'none',
      window=(c.sliding_window or 0) if c.use_sliding_window else 0,
    ),
    moe=dict(
      layers=qwen_keys.layers(c),
      expert=FeedForwardExpert(hidden=c.moe_intermediate_size),
    ),
  )


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  attention = decoder_keys.plain_heads(o)
  return qwen_keys.describe(o, 'Qwen3-MoE') | dict(
    head_dim=attention.head_width,
    attention_bias=attention.has_bias('query', use_bias=False),
  )


NAMES: Table = {
  **ENDS,
  **BLOCK,
  **weight('attention/query_norm', 'self_attn.q_norm', 'D'),
  **weight('attention/key_norm', 'self_attn.k_norm', 'D'),
  **gated_ffn('ffn', 'mlp'),
  **weight('moe/router/w', 'mlp.gate', 'E M -> M E'),
  **experts(),
}
ARCHITECTURE = decoder(
  'qwen3_moe', 'Qwen3Moe', KEYS, qwen_keys.problems, options, describe, NAMES
)
