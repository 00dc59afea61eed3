"""transformers' Qwen2-MoE and Qwen3-MoE as decoders.

No token is dropped. Gates are probabilities among all experts, divided by their
sum with `norm_topk_prob`, which the published checkpoints of Qwen3 have and
those of Qwen2 have not. As transformers 5.24 computes Qwen2-MoE
(arXiv:2407.10671):

- Queries, keys and values have biases, the output projection has none.
- A shared expert's output is multiplied by the sigmoid of a gate of its own and
  added to that of the chosen experts.
- With `use_sliding_window` every second layer below `max_window_layers`, from
  the first on, attends to a window, unless `layer_types` says which layers do.

And Qwen3-MoE (arXiv:2505.09388):

- Queries and keys are normed in each head, before they rotate. Heads may be
  wider than their share of the width.
- With `use_sliding_window` all layers attend to a window.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.interop import decoders
from moe_jax.interop.architecture import layers, sparse_flags
from moe_jax.interop.config_keys import (
  COUNT,
  OPTIONAL_COUNT,
  OPTIONAL_SIZE,
  SIZE,
  Keys,
  Values,
)
from moe_jax.interop.decoders import (
  BLOCK,
  ENDS,
  Table,
  decoder,
  experts,
  gated_ffn,
  weight,
)
from moe_jax.layers.experts.shared_expert import SharedExpertOptions
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

_BIASED = 'query, key, value'
_HONOURED: dict[str, tuple[Any, Any]] = {
  'decoder_sparse_step': (SIZE, 1),
  'mlp_only_layers': (list | None, None),
  'norm_topk_prob': (bool, False),
  'use_sliding_window': (bool, False),
  'sliding_window': (OPTIONAL_COUNT, 4096),
}
KEYS_2 = decoders.keys(
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
    **_HONOURED,
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
KEYS_3 = decoders.keys(
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
    **_HONOURED,
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


def _problems(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from decoders.problems(c)
  yield from decoders.gate_problems(c)
  if c.use_sliding_window and c.sliding_window == 0:
    yield 'sliding_window=0 must be at least 1 with use_sliding_window=True'
  for layer in c.mlp_only_layers or ():
    if not COUNT.holds(layer):
      yield f'mlp_only_layers has {layer!r:.80}, which is no layer'
  if not any(_sparse(c)):
    yield (
      f'decoder_sparse_step={c.decoder_sparse_step} and mlp_only_layers='
      f'{c.mlp_only_layers} leave no layer sparse of {c.num_hidden_layers}'
    )


def _sparse(c: Values) -> tuple[bool, ...]:
  """Whether each layer is sparse."""
  flags = sparse_flags(c.num_hidden_layers, c.decoder_sparse_step, 0)
  dense = c.mlp_only_layers or ()
  return tuple(flag and i not in dense for i, flag in enumerate(flags))


def _problems_2(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from _problems(c)
  yield from decoders.window_problems(_layer_types(c), c.num_hidden_layers)
  if c.use_sliding_window and c.sliding_window is None:
    yield 'sliding_window=None with use_sliding_window=True is not supported'
  if not c.use_sliding_window and decoders.WINDOW in _layer_types(c):
    yield (
      f'layer_types has {decoders.WINDOW}, which needs use_sliding_window'
      ' true; without windows it names full_attention alone'
    )


def _layer_types(c: Values) -> list[Any]:
  if c.layer_types is not None:
    return c.layer_types
  num_window_layers = c.max_window_layers if c.use_sliding_window else 0
  return [
    decoders.FULL if i % 2 or i >= num_window_layers else decoders.WINDOW
    for i in range(c.num_hidden_layers)
  ]


def _options_2(c: Values) -> DecoderOptions:
  return decoders.options(
    c,
    TokenChoice(gates=decoders.gates(c)),
    decoders.heads(
      c,
      biases=_BIASED if c.qkv_bias else 'none',
      **decoders.window_options(_layer_types(c), c.sliding_window),
    ),
    moe=dict(
      layers=layers(_sparse(c)),
      shared_expert=SharedExpertOptions(
        hidden=c.shared_expert_intermediate_size, gated=True
      ),
    ),
  )


def _options_3(c: Values) -> DecoderOptions:
  return decoders.options(
    c,
    TokenChoice(gates=decoders.gates(c)),
    decoders.heads(
      c,
      qk_norm='head',
      qk_norm_epsilon=float(c.rms_norm_eps),
      window=(c.sliding_window or 0) if c.use_sliding_window else 0,
    ),
    moe=dict(layers=layers(_sparse(c))),
  )


def _describe(
  o: DecoderOptions, architecture: str, keys: Keys
) -> dict[str, Any]:
  return decoders.describe(o, architecture, keys) | dict(
    decoder_sparse_step=1,
    mlp_only_layers=[i for i, flag in enumerate(o.sparse) if not flag],
    norm_topk_prob=decoders.is_renormalized(o.moe.router),
    use_sliding_window=any(o.windows),
  )


def _describe_2(o: DecoderOptions) -> dict[str, Any]:
  return _describe(o, 'Qwen2-MoE', KEYS_2) | dict(
    shared_expert_intermediate_size=o.moe.shared_expert.hidden,
    qkv_bias=o.attention.has_bias('query', use_bias=False),
    layer_types=decoders.layer_types(o),
  )


_NAMES: Table = {
  **ENDS,
  **BLOCK,
  **gated_ffn('ffn', 'mlp'),
  **weight('moe/router/w', 'mlp.gate', 'E M -> M E'),
  **experts(),
}
_SHARED_EXPERT: Table = {
  **gated_ffn('moe/shared_expert/ffn', 'mlp.shared_expert'),
  **weight('moe/shared_expert/w_gate', 'mlp.shared_expert_gate', 'G M -> M G'),
}
_NORMS: Table = {
  **weight('attention/query_norm', 'self_attn.q_norm', 'D'),
  **weight('attention/key_norm', 'self_attn.k_norm', 'D'),
}
ARCHITECTURES = (
  decoder(
    'qwen2_moe',
    'Qwen2Moe',
    KEYS_2,
    _problems_2,
    _options_2,
    _describe_2,
    {**_NAMES, **_SHARED_EXPERT},
  ),
  decoder(
    'qwen3_moe',
    'Qwen3Moe',
    KEYS_3,
    _problems,
    _options_3,
    lambda o: _describe(o, 'Qwen3-MoE', KEYS_3),
    {**_NAMES, **_NORMS},
  ),
)
