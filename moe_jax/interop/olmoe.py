"""transformers' OLMoE (arXiv:2409.02060) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- Queries and keys are normed over all heads together, before they are split
  into heads, and clipped after that, as values are.
- Gates are probabilities among all experts. With `norm_topk_prob`, which the
  published checkpoints do not set, a token's gates are divided by their sum.
"""

from typing import Any

from moe_jax.interop import decoders
from moe_jax.interop.config_keys import OPTIONAL_POSITIVE, Values
from moe_jax.interop.decoders import weight

KEYS = decoders.keys(
  dict(
    vocab_size=50304,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=16,
    attention_bias=False,
    intermediate_size=2048,
    num_experts=64,
    num_experts_per_tok=8,
    norm_topk_prob=False,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    router_aux_loss_coef=0.01,
  ),
  honoured={'clip_qkv': (OPTIONAL_POSITIVE, None)},
)


def _options(c: Values) -> dict[str, Any]:
  norm = dict(qk_norm='all', qk_norm_epsilon=float(c.rms_norm_eps))
  return dict(attention=decoders.heads(c, clip=float(c.clip_qkv or 0), **norm))


ARCHITECTURES = (
  decoders.decoder(
    'olmoe',
    'Olmoe',
    KEYS,
    {
      **decoders.DECODER,
      **weight('attention/query_norm', 'self_attn.q_norm', '(H D) -> H D'),
      **weight('attention/key_norm', 'self_attn.k_norm', '(N D) -> N D'),
      **decoders.router('mlp.gate'),
      **decoders.experts(),
    },
    options=_options,
    describe=lambda o: dict(clip_qkv=decoders.plain_heads(o).clip or None),
  ),
)
