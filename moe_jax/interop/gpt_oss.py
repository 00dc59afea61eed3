"""transformers' gpt-oss (https://arxiv.org/abs/2508.10925) as a decoder.

Every layer is sparse and no token is dropped. As transformers 5.24 computes it:

- Every second layer attends to a window, and each head has a logit of its own
  in the softmax, which no value belongs to (a sink).
- All projections, routers and experts have biases. Gates are the softmax of the
  chosen logits, which is the same as probabilities among all experts divided by
  their sum.
- Experts have a clamped activation; gate and up alternate in one tensor.

Published files hold experts in MXFP4 (`mxfp4.py`); bfloat16 is exported.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop import decoder_keys, window_keys
from moe_jax.interop.architecture import decoder
from moe_jax.interop.config_keys import LENGTH, OPTIONAL_SIZE, SIZE, Values
from moe_jax.interop.decoder_names import BLOCK, ENDS, Table, layer, weight
from moe_jax.interop.mapping import Name
from moe_jax.interop.mxfp4 import Mxfp4Files
from moe_jax.layers.experts import FeedForwardExpert
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

_THETA = 150_000.0
_ROPE = dict(
  rope_type='yarn',
  factor=32.0,
  beta_fast=32.0,
  beta_slow=1.0,
  truncate=False,
  original_max_position_embeddings=4096,
)
_ACTIVATION = 'clamped_swiglu'
KEYS = decoder_keys.keys(
  dict(
    vocab_size=201088,
    hidden_size=2880,
    num_hidden_layers=36,
    num_attention_heads=64,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    num_experts_per_tok=4,
    router_aux_loss_coef=0.001,
  ),
  honoured={
    'intermediate_size': (SIZE, 2880),
    'num_local_experts': (SIZE, 128),
    'head_dim': (OPTIONAL_SIZE, 64),
    'sliding_window': (LENGTH, 128),
    'layer_types': (list | None, None),
    'attention_bias': (bool, True),
    'quantization_config': (dict | None, None),
  },
  fixed={'swiglu_alpha': (1.702,), 'swiglu_limit': (7.0,)},
  ignored={
    'initial_context_length': 'rope_scaling has it',
    'experts_per_token': 'it repeats num_experts_per_tok',
  },
  spellings={'num_experts': 'num_local_experts'},
)


def problems(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from decoder_keys.problems(_with_rope(c), theta=_THETA)
  if c.num_experts_per_tok == 1:
    yield 'num_experts_per_tok=1 is not supported: every gate would be 1'
  if c.hidden_act != 'silu':
    yield f"hidden_act={c.hidden_act!r} is not supported, only 'silu'"
  yield from window_keys.problems(_layer_types(c), c.num_hidden_layers)
  method = (c.quantization_config or {}).get('quant_method')
  if method not in (None, 'mxfp4'):
    yield f"quant_method={method!r:.80} is not supported, only 'mxfp4'"


def _with_rope(c: Values) -> Values:
  """The values with the rotary positions that a config without any has."""
  if c.rope_parameters is not None or c.rope_scaling is not None:
    return c
  return Values(**{**vars(c), 'rope_parameters': _ROPE})


def _layer_types(c: Values) -> list[Any]:
  if c.layer_types is not None:
    return c.layer_types
  kinds = window_keys.WINDOW, window_keys.FULL
  return [kinds[i % 2] for i in range(c.num_hidden_layers)]


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  return decoder_keys.options(
    _with_rope(c),
    ffn_hidden=c.intermediate_size,
    num_experts=c.num_local_experts,
    router=TokenChoice(gates='renormalized', use_bias=True),
    theta=_THETA,
    attention=decoder_keys.heads(
      c,
      head_width=c.head_dim or c.hidden_size // c.num_attention_heads,
      **window_keys.options(_layer_types(c), c.sliding_window),
      sinks=True,
      biases='all' if c.attention_bias else 'none',
    ),
    moe=dict(
      expert=FeedForwardExpert(
        hidden=c.intermediate_size, activation=_ACTIVATION, bias='all'
      )
    ),
  )


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  shared = decoder_keys.describe(o, 'gpt-oss')
  attention, moe = decoder_keys.plain_heads(o), decoder_keys.moe_options(o)
  activation = decoder_keys.expert_of(o).activation
  if activation != _ACTIVATION:
    raise InputError(f'its activation is {activation!r}, not {_ACTIVATION!r}')
  return shared | dict(
    hidden_act='silu',
    intermediate_size=decoder_keys.expert_of(o).hidden,
    num_local_experts=moe.num_experts,
    head_dim=attention.head_width,
    sliding_window=attention.window or 128,
    layer_types=window_keys.layer_types(o),
    attention_bias=attention.has_bias('query', use_bias=False),
  )


NAMES: Table = {
  **ENDS,
  **BLOCK,
  **layer('attention/sinks', Name('self_attn.sinks', 'H')),
  **weight('moe/router/w', 'mlp.router', 'E M -> M E'),
  **layer('moe/router/b', Name('mlp.router.bias', 'E')),
  **layer(
    'moe/experts/w_gate',
    Name('mlp.experts.gate_up_proj', 'E M (F 0/2) -> E M F'),
  ),
  **layer(
    'moe/experts/w_in',
    Name('mlp.experts.gate_up_proj', 'E M (F 1/2) -> E M F'),
  ),
  **layer(
    'moe/experts/b_gate',
    Name('mlp.experts.gate_up_proj_bias', 'E (F 0/2) -> E F'),
  ),
  **layer(
    'moe/experts/b_in',
    Name('mlp.experts.gate_up_proj_bias', 'E (F 1/2) -> E F'),
  ),
  **layer('moe/experts/w_out', Name('mlp.experts.down_proj', 'E F M')),
  **layer('moe/experts/b_out', Name('mlp.experts.down_proj_bias', 'E M')),
}
ARCHITECTURE = decoder(
  'gpt_oss',
  'GptOss',
  KEYS,
  problems,
  options,
  describe,
  NAMES,
  files=Mxfp4Files,
)
