"""transformers' Qwen2-MoE (arXiv:2407.10671) as a decoder.

No token is dropped. As transformers 5.24 computes it:

- Queries, keys and values have biases, the output projection has none.
- A shared expert's output is multiplied by the sigmoid of a gate of its own and
  added to that of the chosen experts.
- Gates are probabilities among all experts, divided by their sum with
  `norm_topk_prob`, which the published checkpoints do not have.
- With `use_sliding_window` every second layer below `max_window_layers`, from
  the first on, attends to a window, unless `layer_types` says which layers do.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.interop import decoder_keys, qwen_keys, window_keys
from moe_jax.interop.architecture import decoder
from moe_jax.interop.config_keys import COUNT, SIZE, Values
from moe_jax.interop.decoder_names import (
  BLOCK,
  ENDS,
  Table,
  experts,
  gated_ffn,
  weight,
)
from moe_jax.layers.experts import FeedForwardExpert
from moe_jax.layers.experts.shared_expert import SharedExpertOptions
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

_BIASED = 'query, key, value'
KEYS = decoder_keys.keys(
  dict(
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    rms_norm_eps=1e-6,
    max_position_embeddings=32768,
    num_experts_per_tok=4,
    router_aux_loss_coef=0.001,
  ),
  honoured={
    **qwen_keys.HONOURED,
    'intermediate_size': (SIZE, 5632),
    'moe_intermediate_size': (SIZE, 1408),
    'shared_expert_intermediate_size': (SIZE, 5632),
    'num_experts': (SIZE, 60),
    'qkv_bias': (bool, True),
    'max_window_layers': (COUNT, 28),
    'layer_types': (list | None, None),
  },
  spellings={'num_local_experts': 'num_experts'},
)


def problems(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from qwen_keys.problems(c)
  yield from window_keys.problems(_layer_types(c), c.num_hidden_layers)
  if c.use_sliding_window and c.sliding_window is None:
    yield 'sliding_window=None with use_sliding_window=True is not supported'
  if not c.use_sliding_window and window_keys.WINDOW in _layer_types(c):
    yield (
      f'layer_types has {window_keys.WINDOW}, which needs use_sliding_window'
      ' true; without windows it names full_attention alone'
    )


def _layer_types(c: Values) -> list[Any]:
  if c.layer_types is not None:
    return c.layer_types
  num_window_layers = c.max_window_layers if c.use_sliding_window else 0
  return [
    window_keys.FULL if i % 2 or i >= num_window_layers else window_keys.WINDOW
    for i in range(c.num_hidden_layers)
  ]


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  return decoder_keys.options(
    c,
    ffn_hidden=c.intermediate_size,
    num_experts=c.num_experts,
    router=TokenChoice(gates=decoder_keys.gates(c)),
    attention=decoder_keys.heads(
      c,
      biases=_BIASED if c.qkv_bias else 'none',
      **window_keys.options(_layer_types(c), c.sliding_window),
    ),
    moe=dict(
      layers=qwen_keys.layers(c),
      expert=FeedForwardExpert(hidden=c.moe_intermediate_size),
      shared_expert=SharedExpertOptions(
        hidden=c.shared_expert_intermediate_size, gated=True
      ),
    ),
  )


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  attention, moe = decoder_keys.plain_heads(o), decoder_keys.moe_options(o)
  return qwen_keys.describe(o, 'Qwen2-MoE') | dict(
    shared_expert_intermediate_size=moe.shared_expert.hidden,
    qkv_bias=attention.has_bias('query', use_bias=False),
    layer_types=window_keys.layer_types(o),
  )


NAMES: Table = {
  **ENDS,
  **BLOCK,
  **gated_ffn('ffn', 'mlp'),
  **gated_ffn('moe/shared_expert/ffn', 'mlp.shared_expert'),
  **weight('moe/shared_expert/w_gate', 'mlp.shared_expert_gate', 'G M -> M G'),
  **weight('moe/router/w', 'mlp.gate', 'E M -> M E'),
  **experts(),
}
ARCHITECTURE = decoder(
  'qwen2_moe', 'Qwen2Moe', KEYS, problems, options, describe, NAMES
)
