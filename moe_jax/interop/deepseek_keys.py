"""Keys of config.json and names of tensors that DeepSeek-V2 and V3 share.

Latent attention, leading dense layers, groups of experts and shared experts.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop import decoder_keys, rotary_keys
from moe_jax.interop.config_keys import (
  AMOUNT,
  COUNT,
  OPTIONAL_SIZE,
  POSITIVE,
  SIZE,
  Keys,
  Values,
)
from moe_jax.interop.decoder_names import (
  ENDS,
  NORMS,
  Table,
  experts,
  gated_ffn,
  layer,
  weight,
)
from moe_jax.interop.mapping import Name
from moe_jax.layers.attention import LatentOptions
from moe_jax.layers.experts import FeedForwardExpert
from moe_jax.layers.experts.shared_expert import SharedExpertOptions
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

# The epsilon of transformers' norms of short vectors, whatever rms_norm_eps is.
_EPSILON = 1e-6
_BIASED = 'query_down, kv_down, out'
_REMOTE = "only the model's own remote code reads it"


def keys(
  defaults: Mapping[str, Any],
  honoured: Mapping[str, tuple[Any, Any]],
  fixed: Mapping[str, tuple[Any, ...]],
  training: Mapping[str, tuple[Any, Any, Any, str]] | None = None,
  spellings: Mapping[str, str] | None = None,
) -> Keys:
  """The keys of an architecture; see `decoder_keys.keys`.

  Args:
    defaults: transformers' defaults of the keys that both architectures have.
    honoured: The keys of its own that shape the model.
    fixed: The keys of its own with only some supported values.
    training: The keys of its own that act only in training.
    spellings: Other spellings of its keys.
  """
  d = defaults
  shared_keys: dict[str, tuple[Any, Any]] = {
    name: (kind, d[name])
    for name, kind in (
      ('intermediate_size', SIZE),
      ('moe_intermediate_size', SIZE),
      ('n_routed_experts', SIZE),
      ('n_shared_experts', COUNT),
      ('first_k_dense_replace', COUNT),
      ('n_group', OPTIONAL_SIZE),
      ('topk_group', OPTIONAL_SIZE),
      ('routed_scaling_factor', POSITIVE),
      ('kv_lora_rank', SIZE),
    )
  }
  return decoder_keys.keys(
    {'rms_norm_eps': 1e-6, 'router_aux_loss_coef': 0.0, **d},
    honoured={
      **shared_keys,
      'q_lora_rank': (OPTIONAL_SIZE, 1536),
      'qk_nope_head_dim': (SIZE, 128),
      'qk_rope_head_dim': (SIZE, 64),
      'v_head_dim': (SIZE, 128),
      'attention_bias': (bool, False),
      'quantization_config': (dict | None, None),
      **honoured,
    },
    training={
      'aux_loss_alpha': (
        AMOUNT,
        0.0,
        0.0,
        'transformers has no balance loss here; see sequence_balance_weight '
        'and balance_weight of the router',
      ),
      **(training or {}),
    },
    fixed={'moe_layer_freq': (1,), **fixed},
    ignored={
      **dict.fromkeys(
        ('auto_map', 'seq_aux', 'ep_size', 'pretraining_tp'), _REMOTE
      ),
      **dict.fromkeys(
        ('head_dim', 'qk_head_dim'), 'it follows from the widths of the parts'
      ),
    },
    spellings=spellings or {},
  )


def problems(c: Values) -> Iterator[str]:
  """A text for each value of the shared keys that is not supported."""
  yield from decoder_keys.problems(c)
  if c.quantization_config is not None:
    method = c.quantization_config.get('quant_method')
    yield (
      f'quantization_config has quant_method={method!r:.80}: tensors that are '
      'quantized are not read; convert them to bfloat16, and remove the key'
    )
  kv_heads = c.num_key_value_heads
  if kv_heads not in (None, c.num_attention_heads):
    yield (
      f'num_key_value_heads={kv_heads} is not num_attention_heads='
      f'{c.num_attention_heads}, as latent attention has it'
    )
  if c.n_group and (c.topk_group or 1) > c.n_group:
    yield f'topk_group={c.topk_group} is more than n_group={c.n_group}'
  if c.first_k_dense_replace >= c.num_hidden_layers:
    yield (
      f'first_k_dense_replace={c.first_k_dense_replace} leaves no layer sparse '
      f'of {c.num_hidden_layers}'
    )


def options(
  c: Values,
  router: TokenChoice,
  groups: Mapping[str, Any],
  *,
  interleaved: bool = True,
) -> DecoderOptions:
  """The options of a model.

  Args:
    c: The values of config.json.
    router: The router without groups of experts.
    groups: The options of the groups, if there are several.
    interleaved: Whether the pairs that rotate are neighbours.
  """
  num_dense = c.first_k_dense_replace
  base_options = decoder_keys.options(
    c,
    ffn_hidden=c.intermediate_size,
    num_experts=c.n_routed_experts,
    router=dataclasses.replace(router, **groups),
    attention=LatentOptions(
      num_heads=c.num_attention_heads,
      query_rank=c.q_lora_rank or 0,
      kv_rank=c.kv_lora_rank,
      plain_width=c.qk_nope_head_dim,
      rotary_width=c.qk_rope_head_dim,
      value_width=c.v_head_dim,
      norm_epsilon=_EPSILON,
      biases=_biases(c) if c.attention_bias else 'none',
    ),
    moe=dict(
      layers=decoder_keys.layers(
        [i >= num_dense for i in range(c.num_hidden_layers)]
      ),
      expert=FeedForwardExpert(hidden=c.moe_intermediate_size),
      shared_expert=SharedExpertOptions(
        hidden=c.n_shared_experts * c.moe_intermediate_size
      ),
    ),
  )
  positions = rotary_keys.rotary(c, 10_000.0, interleaved=interleaved)
  return dataclasses.replace(base_options, positions=positions)


def _biases(c: Values) -> str:
  """The names of the projections that have a bias if any has one."""
  return _BIASED if c.q_lora_rank else _BIASED.removeprefix('query_down, ')


def describe(o: DecoderOptions, architecture: str) -> dict[str, Any]:
  """The keys that both architectures have, of a model.

  Raises:
    ValueError: As `decoder_keys.describe`, or the attention is not latent.
  """
  decided = decoder_keys.describe(o, architecture)
  if not isinstance(o.attention, LatentOptions):
    raise InputError(f'its attention is not latent; that of {architecture} is')
  attention, moe = o.attention, decoder_keys.moe_options(o)
  router = decoder_keys.token_choice(o)
  first = o.sparse.index(True)
  groups = router.expert_groups
  return decided | dict(
    intermediate_size=o.ffn.hidden,
    moe_intermediate_size=decoder_keys.expert_of(o).hidden,
    n_routed_experts=moe.num_experts,
    n_shared_experts=num_shared(o),
    first_k_dense_replace=first,
    n_group=groups,
    topk_group=router.chosen_expert_groups if groups > 1 else 1,
    routed_scaling_factor=router.gate_scale,
    q_lora_rank=attention.query_rank or None,
    kv_lora_rank=attention.kv_rank,
    qk_nope_head_dim=attention.plain_width,
    qk_rope_head_dim=attention.rotary_width,
    v_head_dim=attention.value_width,
    attention_bias=attention.has_bias('kv_down', use_bias=False),
  )


def num_shared(o: DecoderOptions) -> int:
  """The number of shared experts, each as wide as a chosen one.

  Raises:
    ValueError: The shared expert has no multiple of that width.
  """
  shared = decoder_keys.moe_options(o).shared_expert.hidden
  hidden = decoder_keys.expert_of(o).hidden
  if shared % hidden:
    raise InputError(
      f"its shared expert is {shared} wide, no multiple of an expert's {hidden}"
    )
  return shared // hidden


NAMES: Table = {
  **ENDS,
  **NORMS,
  **weight('attention/w_query', 'self_attn.q_proj', '(H D) M -> M H D'),
  **weight('attention/w_query_down', 'self_attn.q_a_proj', 'R M -> M R'),
  **weight('attention/query_norm', 'self_attn.q_a_layernorm', 'R'),
  **weight('attention/w_query_up', 'self_attn.q_b_proj', '(H D) R -> R H D'),
  **weight('attention/w_kv_down', 'self_attn.kv_a_proj_with_mqa', 'R M -> M R'),
  **weight('attention/kv_norm', 'self_attn.kv_a_layernorm', 'R'),
  **weight('attention/w_kv_up', 'self_attn.kv_b_proj', '(H D) R -> R H D'),
  **weight('attention/w_out', 'self_attn.o_proj', 'M (H D) -> H D M'),
  **layer('attention/b_query_down', Name('self_attn.q_a_proj.bias', 'R')),
  **layer(
    'attention/b_kv_down', Name('self_attn.kv_a_proj_with_mqa.bias', 'R')
  ),
  **layer('attention/b_out', Name('self_attn.o_proj.bias', 'M')),
  **gated_ffn('ffn', 'mlp'),
  **gated_ffn('moe/shared_expert/ffn', 'mlp.shared_experts'),
  **weight('moe/router/w', 'mlp.gate', 'E M -> M E'),
  **experts(),
}
