"""transformers' Mixtral (arXiv:2401.04088) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- Positions count padding, too, but logits depend only on their differences.
- `sliding_window` includes the token itself.
- `head_dim` may differ from the width over the number of heads; gates are the
  chosen experts' probabilities, divided by their sum (`gates='renormalized'`).
- In memory, experts are fused (`gate_up_proj`); in files each expert has its
  own tensors. The names of both are read, and an export has those of files.
"""

from moe_jax.interop import decoders

KEYS = decoders.keys(
  dict(
    num_key_value_heads=8,
    head_dim=None,
    intermediate_size=14336,
    num_local_experts=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    sliding_window=None,
  ),
  training={'router_jitter_noise': decoders.JITTER},
)
ARCHITECTURES = (
  decoders.decoder(
    'mixtral',
    'Mixtral',
    KEYS,
    {
      **decoders.DECODER,
      **decoders.router('block_sparse_moe.gate', 'mlp.gate'),
      **decoders.experts('block_sparse_moe.experts', 'w1', 'w3', 'w2'),
    },
    rope=dict(rope_theta=1e6),
  ),
)
