"""transformers' GraniteMoE (IBM's Granite 3) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- Four constants of the config scale the model: one multiplies embeddings, one
  multiplies attention's scores (in place of one over the root of a head's
  width), one multiplies layers' outputs, and one divides logits.
- Gates are the softmax of the chosen logits, which is the same as probabilities
  among all experts divided by their sum.
- Experts are stacked in files, gate and up in one tensor.
"""

from typing import Any

from moe_jax.interop import decoders
from moe_jax.interop.config_keys import POSITIVE, Values
from moe_jax.interop.decoders import layer
from moe_jax.interop.mapping import Names
from moe_jax.models import DecoderOptions
from moe_jax.models.embeddings import EmbeddingOptions

KEYS = decoders.keys(
  dict(attention_bias=False, intermediate_size=11008, num_local_experts=8),
  honoured={
    'embedding_multiplier': (POSITIVE, 1.0),
    'attention_multiplier': (POSITIVE, 1.0),
    'residual_multiplier': (POSITIVE, 1.0),
    'logits_scaling': (POSITIVE, 1.0),
  },
)


def _options(c: Values) -> dict[str, Any]:
  scale = float(c.attention_multiplier)
  return dict(
    attention=decoders.heads(c, scale='fixed', fixed_scale=scale),
    residual_multiplier=float(c.residual_multiplier),
    embedding=EmbeddingOptions(
      tie=c.tie_word_embeddings,
      multiplier=float(c.embedding_multiplier),
      logits_divisor=float(c.logits_scaling),
    ),
  )


def _describe(o: DecoderOptions) -> dict[str, Any]:
  attention = decoders.plain_heads(o)
  return dict(
    embedding_multiplier=o.embedding.multiplier,
    attention_multiplier=attention.score_scale or attention.head_width**-0.5,
    residual_multiplier=o.residual_multiplier,
    logits_scaling=o.embedding.logits_divisor,
  )


_MOE = 'block_sparse_moe'


def _experts(path: str, stored: str, fused: str, form: str) -> Names:
  """The table entry of the experts' kernel `path`, of the layout `form`.

  `stored` names the tensor in files, `fused` that in transformers' memory; both
  names are read, and the first is written.
  """
  names = f'{stored}.weight', f'experts.{fused}'
  return layer(f'moe/experts/{path}', *((f'{_MOE}.{n}', form) for n in names))


_GATE_UP = 'input_linear', 'gate_up_proj'
ARCHITECTURES = (
  decoders.decoder(
    'granitemoe',
    'GraniteMoe',
    KEYS,
    {
      **decoders.DECODER,
      **decoders.router(f'{_MOE}.router.layer', f'{_MOE}.router'),
      **_experts('w_gate', *_GATE_UP, 'E (0/2 F) M -> E M F'),
      **_experts('w_in', *_GATE_UP, 'E (1/2 F) M -> E M F'),
      **_experts('w_out', 'output_linear', 'down_proj', 'E M F -> E F M'),
    },
    options=_options,
    describe=_describe,
  ),
)
