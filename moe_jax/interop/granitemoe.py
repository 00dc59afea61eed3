"""transformers' GraniteMoE (IBM's Granite 3) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- Four numbers multiply embeddings, scores of attention (in place of one over
  the root of a head's width), outputs of layers, and divide logits.
- Gates are the softmax of the chosen logits, which is the same as probabilities
  among all experts divided by their sum.
- Experts are stacked in files, gate and up in one tensor.
"""

from typing import Any

from moe_jax.interop import decoders
from moe_jax.interop.config_keys import POSITIVE, SIZE, Values
from moe_jax.interop.decoders import BLOCK, ENDS, Table, decoder, layer
from moe_jax.interop.mapping import Name
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions
from moe_jax.models.embeddings import EmbeddingOptions

KEYS = decoders.keys(
  dict(
    vocab_size=32000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.001,
  ),
  honoured={
    'intermediate_size': (SIZE, 11008),
    'num_local_experts': (SIZE, 8),
    'attention_bias': (bool, False),
    'embedding_multiplier': (POSITIVE, 1.0),
    'attention_multiplier': (POSITIVE, 1.0),
    'residual_multiplier': (POSITIVE, 1.0),
    'logits_scaling': (POSITIVE, 1.0),
  },
  spellings={'num_experts': 'num_local_experts'},
)


def problems(c: Values) -> list[str]:
  """A text for each value that our decoders cannot express."""
  return [*decoders.problems(c), *decoders.gate_problems(c)]


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  scale = float(c.attention_multiplier)
  return decoders.options(
    c,
    TokenChoice(gates='renormalized'),
    decoders.heads(c, scale='fixed', fixed_scale=scale),
    residual_multiplier=float(c.residual_multiplier),
    embedding=EmbeddingOptions(
      tie=c.tie_word_embeddings,
      multiplier=float(c.embedding_multiplier),
      logits_divisor=float(c.logits_scaling),
    ),
  )


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  shared = decoders.describe(o, 'GraniteMoE', KEYS)
  attention = decoders.plain_heads(o)
  scale = attention.score_scale or attention.head_width**-0.5
  return shared | dict(
    embedding_multiplier=o.embedding.multiplier,
    attention_multiplier=scale,
    residual_multiplier=o.residual_multiplier,
    logits_scaling=o.embedding.logits_divisor,
  )


_MOE = 'block_sparse_moe'
_GATE, _UP = 'E (0/2 F) M -> E M F', 'E (1/2 F) M -> E M F'
NAMES: Table = {
  **ENDS,
  **BLOCK,
  **layer(
    'moe/router/w',
    Name(f'{_MOE}.router.layer.weight', 'E M -> M E'),
    Name(f'{_MOE}.router.weight', 'E M -> M E'),
  ),
  **layer(
    'moe/experts/w_gate',
    Name(f'{_MOE}.input_linear.weight', _GATE),
    Name(f'{_MOE}.experts.gate_up_proj', _GATE),
  ),
  **layer(
    'moe/experts/w_in',
    Name(f'{_MOE}.input_linear.weight', _UP),
    Name(f'{_MOE}.experts.gate_up_proj', _UP),
  ),
  **layer(
    'moe/experts/w_out',
    Name(f'{_MOE}.output_linear.weight', 'E M F -> E F M'),
    Name(f'{_MOE}.experts.down_proj', 'E M F -> E F M'),
  ),
}
ARCHITECTURE = decoder(
  'granitemoe', 'GraniteMoe', KEYS, problems, options, describe, NAMES
)
