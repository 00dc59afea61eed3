"""transformers' Qwen2-MoE and Qwen3-MoE as decoders.

No token is dropped. Gates are probabilities among all experts, divided by their
sum with `norm_topk_prob`, which the published checkpoints of Qwen3 set and
those of Qwen2 do not. As transformers 5.24 computes Qwen2-MoE
(arXiv:2407.10671):

- Queries, keys and values have biases, the output projection has none.
- A shared expert's output is multiplied by the sigmoid of a gate of its own and
  added to that of the chosen experts.
- With `use_sliding_window` every second layer below `max_window_layers`, from
  the first on, attends to a window, unless `layer_types` says which layers do.

As transformers 5.24 computes Qwen3-MoE (arXiv:2505.09388):

- Queries and keys are normed in each head, before they rotate. Heads may be
  wider than their share of the width.
- With `use_sliding_window` all layers attend to a window.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.interop import config_keys, decoders
from moe_jax.interop.architecture import sparse_flags
from moe_jax.interop.config_keys import Values
from moe_jax.interop.decoders import gated_ffn, weight
from moe_jax.layers.experts import SharedExpertOptions
from moe_jax.models import DecoderOptions

_DEFAULTS = dict(
  vocab_size=151936,
  hidden_size=2048,
  num_hidden_layers=24,
  norm_topk_prob=False,
  max_position_embeddings=32768,
  use_sliding_window=False,
)
_HONOURED = {
  'decoder_sparse_step': (config_keys.SIZE, 1),
  'mlp_only_layers': (list | None, None),
  'sliding_window': (config_keys.OPTIONAL_COUNT, 4096),
}
KEYS_2 = decoders.keys(
  dict(
    _DEFAULTS,
    num_attention_heads=16,
    num_key_value_heads=16,
    layer_types=None,
    intermediate_size=5632,
    moe_intermediate_size=1408,
    num_experts=60,
    num_experts_per_tok=4,
  ),
  honoured={
    **_HONOURED,
    'shared_expert_intermediate_size': (config_keys.SIZE, 5632),
    'qkv_bias': (bool, True),
    'max_window_layers': (config_keys.COUNT, 28),
  },
)
KEYS_3 = decoders.keys(
  dict(
    _DEFAULTS,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=None,
    attention_bias=False,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
  ),
  honoured=_HONOURED,
  # The published Qwen3-Coder has these keys; transformers does not read them.
  fixed={
    'qkv_bias': (False,),
    'shared_expert_intermediate_size': (0, None),
    'use_qk_norm': (True,),
  },
  ignored=['max_window_layers'],  # transformers does not read it
)


def _problems(c: Values) -> Iterator[str]:
  yield from decoders.gate_problems(c)
  if c.use_sliding_window and c.sliding_window == 0:
    yield 'sliding_window=0 must be at least 1 with use_sliding_window=True'
  for layer in c.mlp_only_layers or ():
    if not config_keys.COUNT.holds(layer):
      yield f'mlp_only_layers has {layer!r:.80}, which is no layer'


def _sparse(c: Values) -> list[bool]:
  flags = sparse_flags(c.num_hidden_layers, c.decoder_sparse_step, 0)
  dense = c.mlp_only_layers or ()
  return [flag and i not in dense for i, flag in enumerate(flags)]


def _problems_2(c: Values) -> Iterator[str]:
  yield from _problems(c)
  if c.use_sliding_window and c.sliding_window is None:
    yield 'sliding_window=None with use_sliding_window=True is not supported'
  if not c.use_sliding_window and decoders.WINDOW in decoders.layer_types(c):
    yield (
      f'layer_types has {decoders.WINDOW}, which needs use_sliding_window'
      ' true; without windows it names full_attention alone'
    )


def _options_2(c: Values) -> dict[str, Any]:
  biases = 'query, key, value' if c.qkv_bias else 'none'
  shared = SharedExpertOptions(
    hidden=c.shared_expert_intermediate_size, gated=True
  )
  return dict(
    attention=decoders.heads(c, biases=biases),
    moe=dict(shared_expert=shared),
  )


def _options_3(c: Values) -> dict[str, Any]:
  norm = dict(qk_norm='head', qk_norm_epsilon=float(c.rms_norm_eps))
  return dict(attention=decoders.heads(c, **norm))


def _describe(o: DecoderOptions) -> dict[str, Any]:
  dense = [i for i, flag in enumerate(o.sparse) if not flag]
  return dict(decoder_sparse_step=1, mlp_only_layers=dense)


def _describe_2(o: DecoderOptions) -> dict[str, Any]:
  return _describe(o) | dict(
    shared_expert_intermediate_size=o.moe.shared_expert.hidden,
    qkv_bias=o.attention.has_bias('query', use_bias=False),
  )


_NAMES = {
  **decoders.DECODER,
  **gated_ffn('ffn', 'mlp'),
  **decoders.router('mlp.gate'),
  **decoders.experts(),
}
_SHARED_GATE = 'mlp.shared_expert_gate'
ARCHITECTURES = (
  decoders.decoder(
    'qwen2_moe',
    'Qwen2Moe',
    KEYS_2,
    {
      **_NAMES,
      **gated_ffn('moe/shared_expert/ffn', 'mlp.shared_expert'),
      **weight('moe/shared_expert/w_gate', _SHARED_GATE, 'G M -> M G'),
    },
    options=_options_2,
    describe=_describe_2,
    problems=_problems_2,
    sparse=_sparse,
  ),
  decoders.decoder(
    'qwen3_moe',
    'Qwen3Moe',
    KEYS_3,
    {**_NAMES, **decoders.HEAD_NORMS},
    options=_options_3,
    describe=_describe,
    problems=_problems,
    sparse=_sparse,
  ),
)
