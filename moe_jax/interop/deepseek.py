"""DeepSeekMoE-16B, and transformers' DeepSeek-V2 and V3, as decoders.

No token is dropped, the shared experts of a layer are one feed-forward of their
summed width, and the first layers are dense.

DeepSeekMoE (arXiv:2401.06066): transformers has no class for it; its
checkpoints bring their own code. As that code computes it:

- Attention is LLaMA's.
- From `first_k_dense_replace` on, the layers whose number `moe_layer_freq`
  divides are sparse.
- Gates are probabilities among all experts. With `norm_topk_prob`, which the
  published checkpoints do not set, a token's gates are divided by their sum if
  there are several.
- In training each sequence has its own balance loss; with `seq_aux` false the
  whole batch has a single loss.

DeepSeek-V2 (arXiv:2405.04434), as transformers 5.24 computes it:

- Attention is latent, and the norms of its compressed vectors have an epsilon
  of their own.
- Gates are probabilities among all experts times `routed_scaling_factor`.
  transformers does not read `norm_topk_prob`, so the value true is refused.
- With `topk_method` 'group_limited_greedy' a token chooses groups of experts by
  their best probability; experts of other groups have a probability of 0.

DeepSeek-V3 (arXiv:2412.19437), and so Moonlight and Kimi-K2, as transformers
5.24 computes it:

- The score of an expert is the sigmoid of its logit plus its balancing bias. A
  token first chooses groups, by the sum of their two best scores, and then
  experts in these groups, by their scores.
- Gates are sigmoids without the bias, divided by their sum plus 1e-20 if
  `norm_topk_prob` is true, times `routed_scaling_factor`.
- Layers behind the last one, which predict further tokens, are not read.

The bias is not a parameter but the state of a router (`models/trees.py`).
Training moves it by the published rate, unless the run's config has another.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop import config_keys, decoders, rotary_keys
from moe_jax.interop.config_keys import Values
from moe_jax.interop.decoders import gated_ffn, layer, weight
from moe_jax.layers.attention import LatentOptions
from moe_jax.layers.routers import TokenChoice
from moe_jax.layers.routers.token_choice import PUBLISHED_RATE
from moe_jax.models import DecoderOptions

# transformers' epsilon in the norms of latent attention's compressed vectors,
# whatever rms_norm_eps is.
_EPSILON = 1e-6
_GREEDY, _GROUPED = 'greedy', 'group_limited_greedy'
# transformers skips layer 61 of every checkpoint, and so does an import, since
# DeepSeek-V3's own has a further layer 61 behind those of its model, 0 to 60.
_PUBLISHED_LAYERS = 61

KEYS_V1 = decoders.keys(
  dict(
    vocab_size=102400,
    num_hidden_layers=30,
    num_key_value_heads=32,
    attention_bias=False,
    intermediate_size=11008,
    moe_intermediate_size=1407,
    n_routed_experts=None,
    num_experts_per_tok=None,
    norm_topk_prob=False,
    first_k_dense_replace=0,
  ),
  honoured={
    'n_shared_experts': (config_keys.OPTIONAL_SIZE, None),
    'moe_layer_freq': (config_keys.SIZE, 1),
  },
  training={'seq_aux': (bool, True, ..., '')},
  # Other values of `pretraining_tp` would split products, which the published
  # code cannot do for experts.
  fixed={'pretraining_tp': (1,), 'scoring_func': ('softmax',)},
  spellings={'aux_loss_alpha': 'router_aux_loss_coef'},
)
# The keys and the tensors that DeepSeek-V2 and V3 have in common.
_LATENT_DEFAULTS: Mapping[str, Any] = dict(
  attention_bias=False, router_aux_loss_coef=0.0
)
_LATENT_HONOURED: Mapping[str, tuple[Any, Any]] = {
  'q_lora_rank': (config_keys.OPTIONAL_SIZE, 1536),
  'kv_lora_rank': (config_keys.SIZE, 512),
  'qk_nope_head_dim': (config_keys.SIZE, 128),
  'qk_rope_head_dim': (config_keys.SIZE, 64),
  'v_head_dim': (config_keys.SIZE, 128),
  'quantization_config': (dict | None, None),
}
_LATENT_TRAINING: Mapping[str, tuple[Any, Any, Any, str]] = {
  'aux_loss_alpha': (
    config_keys.AMOUNT,
    0.0,
    0.0,
    'transformers has no balance loss here; see sequence_balance_weight '
    'and balance_weight of the router',
  )
}
# Only the models' own remote code reads the first three keys. The last two
# follow from the widths of the rotated and the other part of a head.
_LATENT_IGNORED = (
  'seq_aux',
  'ep_size',
  'pretraining_tp',
  'head_dim',
  'qk_head_dim',
)
KEYS_V2 = decoders.keys(
  dict(
    _LATENT_DEFAULTS,
    vocab_size=102400,
    intermediate_size=11008,
    moe_intermediate_size=1407,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=None,
    first_k_dense_replace=0,
    n_group=None,
    topk_group=None,
    routed_scaling_factor=1.0,
  ),
  honoured={**_LATENT_HONOURED, 'topk_method': (str, _GREEDY)},
  training=_LATENT_TRAINING,
  fixed={
    'moe_layer_freq': (1,),
    'mlp_bias': (False,),
    'norm_topk_prob': (False, None),
    'scoring_func': ('softmax',),
  },
  ignored=_LATENT_IGNORED,
)
KEYS_V3 = decoders.keys(
  dict(
    _LATENT_DEFAULTS,
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    max_position_embeddings=4096,
  ),
  honoured={**_LATENT_HONOURED, 'rope_interleave': (bool, True)},
  training={
    **_LATENT_TRAINING,
    'num_nextn_predict_layers': (
      config_keys.COUNT,
      1,
      0,
      'the layers that predict further tokens are left out',
    ),
  },
  fixed={
    'moe_layer_freq': (1,),
    'scoring_func': ('sigmoid',),
    'topk_method': ('noaux_tc',),
  },
  ignored=_LATENT_IGNORED,
  spellings={'num_mtp_layers': 'num_nextn_predict_layers'},
)


def _sparse(c: Values) -> list[bool]:
  first, step = c.first_k_dense_replace, c.moe_layer_freq
  return [i >= first and i % step == 0 for i in range(c.num_hidden_layers)]


def _width_problems(c: Values) -> Iterator[str]:
  if c.hidden_size % c.num_attention_heads:
    yield (
      f'num_attention_heads={c.num_attention_heads} does not divide '
      f'hidden_size={c.hidden_size}'
    )


def _latent_problems(c: Values) -> Iterator[str]:
  """A text for each refused value of a key that V2 and V3 both have."""
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


def _problems_v2(c: Values) -> Iterator[str]:
  yield from _latent_problems(c)
  yield from _width_problems(c)
  if c.topk_method not in (_GREEDY, _GROUPED):
    choices = f'only {_GREEDY!r} or {_GROUPED!r}'
    yield f'topk_method={c.topk_method!r:.80} is not supported, {choices}'
  if c.topk_method == _GROUPED and not (c.n_group and c.topk_group):
    yield f'topk_method={_GROUPED!r} needs n_group and topk_group'


def _problems_v3(c: Values) -> Iterator[str]:
  yield from _latent_problems(c)
  for name in ('n_group', 'topk_group'):
    if getattr(c, name) is None:
      yield f'{name}=None is not supported; all experts are one group with 1'


def _options_v1(c: Values) -> dict[str, Any]:
  weight = float(c.router_aux_loss_coef)
  by_sequence = dict(balance_weight=0.0, sequence_balance_weight=weight)
  renormalized = c.norm_topk_prob and c.num_experts_per_tok > 1
  biases = 'all' if c.attention_bias else 'model'
  return dict(
    router=TokenChoice(gates='renormalized' if renormalized else 'raw'),
    attention=decoders.heads(c, biases=biases),
    losses=by_sequence if c.seq_aux else None,
  )


def _latent(c: Values) -> LatentOptions:
  biases = 'query_down, kv_down, out' if c.q_lora_rank else 'kv_down, out'
  return LatentOptions(
    num_heads=c.num_attention_heads,
    query_rank=c.q_lora_rank or 0,
    kv_rank=c.kv_lora_rank,
    plain_width=c.qk_nope_head_dim,
    rotary_width=c.qk_rope_head_dim,
    value_width=c.v_head_dim,
    norm_epsilon=_EPSILON,
    biases=biases if c.attention_bias else 'none',
  )


def _router(c: Values, score: str, outside: str, **options: Any) -> TokenChoice:
  """A router with scaled gates, and groups of experts where there are several.

  Args:
    c: The values of config.json.
    score: What a group is scored by, its 'best' expert or its 'two_best'.
    outside: The score of experts of other groups, 'zero' or 'minus_infinity'.
    **options: Other options of the router.
  """
  if c.n_group > 1:
    options |= dict(
      expert_groups=c.n_group,
      chosen_expert_groups=c.topk_group,
      expert_group_score=score,
      outside_expert_groups=outside,
    )
  return TokenChoice(gate_scale=float(c.routed_scaling_factor), **options)


def _options_v2(c: Values) -> dict[str, Any]:
  if c.topk_method != _GROUPED:
    c = Values(**{**vars(c), 'n_group': 1})
  return dict(
    router=_router(c, 'best', 'zero', gates='raw'),
    attention=_latent(c),
    positions=rotary_keys.rotary(c, interleaved=True),
  )


def _options_v3(c: Values) -> dict[str, Any]:
  gates = 'sigmoid_renormalized' if c.norm_topk_prob else 'sigmoid'
  bias_rate = PUBLISHED_RATE
  return dict(
    router=_router(
      c, 'two_best', 'minus_infinity', gates=gates, balance_bias_rate=bias_rate
    ),
    attention=_latent(c),
    positions=rotary_keys.rotary(c, interleaved=c.rope_interleave),
  )


def _describe_v1(o: DecoderOptions) -> dict[str, Any]:
  router, L = o.moe.router, o.num_layers
  keys = dict(num_hidden_layers=L, first_k_dense_replace=o.sparse.index(True))
  steps = (
    step
    for step in range(1, L + 1)
    if tuple(_sparse(Values(moe_layer_freq=step, **keys))) == o.sparse
  )
  if (step := next(steps, None)) is None:
    raise InputError(
      f'its sparse layers {o.moe.layers!r} are not those that one number '
      'divides'
    )
  by_sequence = getattr(router, 'sequence_balance_weight', 0.0)
  num_shared = o.moe.shared_expert.hidden // decoders.expert_of(o).hidden
  return dict(
    n_shared_experts=num_shared or None,
    moe_layer_freq=step,
    aux_loss_alpha=by_sequence or getattr(router, 'balance_weight', 0.0),
    seq_aux=bool(by_sequence),
  )


def _describe_latent(o: DecoderOptions) -> dict[str, Any]:
  attention = o.attention
  if not isinstance(attention, LatentOptions):
    raise InputError('its attention is not latent')
  return dict(
    q_lora_rank=attention.query_rank or None,
    kv_lora_rank=attention.kv_rank,
    qk_nope_head_dim=attention.plain_width,
    qk_rope_head_dim=attention.rotary_width,
    v_head_dim=attention.value_width,
  )


def _describe_v2(o: DecoderOptions) -> dict[str, Any]:
  groups = getattr(o.moe.router, 'expert_groups', 1)
  return _describe_latent(o) | dict(
    topk_method=_GROUPED if groups > 1 else _GREEDY, norm_topk_prob=False
  )


def _describe_v3(o: DecoderOptions) -> dict[str, Any]:
  return _describe_latent(o) | dict(
    rope_interleave=getattr(o.positions, 'interleaved', False),
    num_nextn_predict_layers=0,
  )


def _further_layers(c: Values) -> tuple[str, ...]:
  """Patterns of the names of tensors of layers behind the model's last one."""
  L = c.num_hidden_layers
  further = {*range(L, L + c.num_nextn_predict_layers), _PUBLISHED_LAYERS}
  return tuple(
    rf'(^|\.)layers\.{number}\.' for number in further if number >= L
  )


FFNS = {
  **gated_ffn('ffn', 'mlp'),
  **gated_ffn('moe/shared_expert/ffn', 'mlp.shared_experts'),
  **decoders.router('mlp.gate'),
  **decoders.experts(),
}
# In layouts, R is the width of a compressed vector.
_KV_DOWN = 'self_attn.kv_a_proj_with_mqa'
_BIAS = 'mlp.gate.e_score_correction_bias'
_LATENT = {
  **decoders.COMMON,
  **weight('attention/w_query', 'self_attn.q_proj', '(H D) M -> M H D'),
  **weight('attention/w_query_down', 'self_attn.q_a_proj', 'R M -> M R'),
  **weight('attention/query_norm', 'self_attn.q_a_layernorm', 'R'),
  **weight('attention/w_query_up', 'self_attn.q_b_proj', '(H D) R -> R H D'),
  **weight('attention/w_kv_down', _KV_DOWN, 'R M -> M R'),
  **weight('attention/kv_norm', 'self_attn.kv_a_layernorm', 'R'),
  **weight('attention/w_kv_up', 'self_attn.kv_b_proj', '(H D) R -> R H D'),
  **weight('attention/w_out', 'self_attn.o_proj', 'M (H D) -> H D M'),
  **layer('attention/b_query_down', ('self_attn.q_a_proj.bias', 'R')),
  **layer('attention/b_kv_down', (f'{_KV_DOWN}.bias', 'R')),
  **layer('attention/b_out', ('self_attn.o_proj.bias', 'M')),
  **FFNS,
}
ARCHITECTURES = (
  decoders.decoder(
    'deepseek',
    'Deepseek',
    KEYS_V1,
    {**decoders.DECODER, **FFNS},
    options=_options_v1,
    describe=_describe_v1,
    problems=_width_problems,
    sparse=_sparse,
    rope_types=('default',),
    needs_code=True,
  ),
  decoders.decoder(
    'deepseek_v2',
    'DeepseekV2',
    KEYS_V2,
    _LATENT,
    options=_options_v2,
    describe=_describe_v2,
    problems=_problems_v2,
  ),
  decoders.decoder(
    'deepseek_v3',
    'DeepseekV3',
    KEYS_V3,
    {**_LATENT, **layer('moe/router/balance_bias', (_BIAS, 'E'))},
    options=_options_v3,
    describe=_describe_v3,
    problems=_problems_v3,
    skipped_tensors=_further_layers,
  ),
)
