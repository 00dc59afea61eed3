"""DeepSeekMoE-16B, and transformers' DeepSeek-V2 and V3, as decoders.

No token is dropped, shared experts are one of their widths together, and the
first layers are dense.

DeepSeekMoE (arXiv:2401.06066): transformers has no class for it; its
checkpoints bring their own code. As that code computes it:

- Attention is LLaMA's.
- From `first_k_dense_replace` on, the layers whose number `moe_layer_freq`
  divides are sparse.
- Gates are probabilities among all experts. With `norm_topk_prob`, which the
  published checkpoints do not have, several of a token are divided by their
  sum.
- In training each sequence has its own balance loss, or with `seq_aux` false
  the whole batch has one.

DeepSeek-V2 (arXiv:2405.04434), as transformers 5.24 computes it:

- Attention is latent, and the norms of its short vectors have an epsilon of
  their own.
- Gates are probabilities among all experts times `routed_scaling_factor`;
  `norm_topk_prob` is not read, so that true is refused.
- With `topk_method` 'group_limited_greedy' a token chooses groups by their best
  probability, and experts outside have a probability of 0.

DeepSeek-V3 (arXiv:2412.19437), and so Moonlight and Kimi-K2, as transformers
5.24 computes it:

- A token chooses by the sigmoid of each logit plus the balancing bias of the
  expert, first groups by the sum of their two best, then experts in them.
- Gates are sigmoids without the bias, divided by their sum plus 1e-20 if
  `norm_topk_prob` is true, times `routed_scaling_factor`.
- Layers behind the last one, which predict further tokens, are not read.

The bias is no parameter but the state of a router (`models/trees.py`),
which training moves by the published rate unless the run's config has another.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop import decoders, rotary_keys
from moe_jax.interop.architecture import layers
from moe_jax.interop.config_keys import (
  AMOUNT,
  COUNT,
  OPTIONAL_SIZE,
  POSITIVE,
  SIZE,
  Keys,
  Values,
)
from moe_jax.interop.decoders import (
  BLOCK,
  ENDS,
  NORMS,
  Table,
  decoder,
  experts,
  gated_ffn,
  layer,
  weight,
)
from moe_jax.interop.mapping import Name
from moe_jax.layers.attention import LatentOptions
from moe_jax.layers.experts.shared_expert import SharedExpertOptions
from moe_jax.layers.positions import Rotary
from moe_jax.layers.routers import TokenChoice
from moe_jax.layers.routers.balancing import PUBLISHED_RATE
from moe_jax.models import DecoderOptions

# The epsilon of transformers' norms of short vectors, whatever rms_norm_eps is.
_EPSILON = 1e-6
_BIASED = 'query_down, kv_down, out'
_REMOTE = "only the model's own remote code reads it"
_GREEDY, _GROUPED = 'greedy', 'group_limited_greedy'
# transformers leaves layer 61 out of every checkpoint, as DeepSeek-V3's own has
# it behind its 61 layers.
_PUBLISHED_LAYERS = 61
_V3_GATES = {True: 'sigmoid_renormalized', False: 'sigmoid'}

KEYS_V1 = decoders.keys(
  dict(
    vocab_size=102400,
    hidden_size=4096,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    num_experts_per_tok=None,
    router_aux_loss_coef=0.001,
  ),
  honoured={
    'intermediate_size': (SIZE, 11008),
    'moe_intermediate_size': (SIZE, 1407),
    'n_routed_experts': (SIZE, None),
    'n_shared_experts': (OPTIONAL_SIZE, None),
    'first_k_dense_replace': (COUNT, 0),
    'moe_layer_freq': (SIZE, 1),
    'norm_topk_prob': (bool, False),
    'attention_bias': (bool, False),
  },
  training={'seq_aux': (bool, True, ..., '')},
  # The published code cannot split the products of experts.
  fixed={'pretraining_tp': (1,), 'scoring_func': ('softmax',)},
  spellings={'aux_loss_alpha': 'router_aux_loss_coef'},
)


def _latent_keys(
  defaults: Mapping[str, Any],
  honoured: Mapping[str, tuple[Any, Any]],
  fixed: Mapping[str, tuple[Any, ...]],
  training: Mapping[str, tuple[Any, Any, Any, str]] | None = None,
  spellings: Mapping[str, str] | None = None,
) -> Keys:
  """The keys of V2 or V3; see `decoders.keys`."""
  return decoders.keys(
    {'rms_norm_eps': 1e-6, 'router_aux_loss_coef': 0.0, **defaults},
    honoured={
      'q_lora_rank': (OPTIONAL_SIZE, 1536),
      'kv_lora_rank': (SIZE, 512),
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


KEYS_V2 = _latent_keys(
  dict(
    vocab_size=102400,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    num_experts_per_tok=None,
  ),
  honoured={
    'intermediate_size': (SIZE, 11008),
    'moe_intermediate_size': (SIZE, 1407),
    'n_routed_experts': (SIZE, 64),
    'n_shared_experts': (COUNT, 2),
    'first_k_dense_replace': (COUNT, 0),
    'n_group': (OPTIONAL_SIZE, None),
    'topk_group': (OPTIONAL_SIZE, None),
    'routed_scaling_factor': (POSITIVE, 1.0),
    'topk_method': (str, _GREEDY),
  },
  fixed={
    'mlp_bias': (False,),
    'norm_topk_prob': (False, None),
    'scoring_func': ('softmax',),
  },
  spellings={'num_experts': 'n_routed_experts'},
)
KEYS_V3 = _latent_keys(
  dict(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    max_position_embeddings=4096,
    num_experts_per_tok=8,
  ),
  honoured={
    'intermediate_size': (SIZE, 18432),
    'moe_intermediate_size': (SIZE, 2048),
    'n_routed_experts': (SIZE, 256),
    'n_shared_experts': (COUNT, 1),
    'first_k_dense_replace': (COUNT, 3),
    'n_group': (OPTIONAL_SIZE, 8),
    'topk_group': (OPTIONAL_SIZE, 4),
    'routed_scaling_factor': (POSITIVE, 2.5),
    'norm_topk_prob': (bool, True),
    'rope_interleave': (bool, True),
  },
  fixed={'scoring_func': ('sigmoid',), 'topk_method': ('noaux_tc',)},
  training={
    'num_nextn_predict_layers': (
      COUNT,
      1,
      0,
      'the layers that predict further tokens are left out',
    )
  },
  spellings={
    'num_local_experts': 'n_routed_experts',
    'num_mtp_layers': 'num_nextn_predict_layers',
  },
)


def _problems_v1(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from decoders.problems(c, rope_types=('default',))
  yield from _width_problems(c)
  first, step = c.first_k_dense_replace, c.moe_layer_freq
  if not any(_sparse(c.num_hidden_layers, first, step)):
    yield (
      f'first_k_dense_replace={first} and moe_layer_freq={step} leave no layer '
      f'sparse of {c.num_hidden_layers}'
    )


def _sparse(num_layers: int, first: int, step: int) -> tuple[bool, ...]:
  """Whether each layer is sparse."""
  return tuple(i >= first and i % step == 0 for i in range(num_layers))


def _width_problems(c: Values) -> Iterator[str]:
  if c.hidden_size % c.num_attention_heads:
    yield (
      f'num_attention_heads={c.num_attention_heads} does not divide '
      f'hidden_size={c.hidden_size}'
    )


def _latent_problems(c: Values) -> Iterator[str]:
  """A text for each value of the keys of both V2 and V3 that is refused."""
  yield from decoders.problems(c)
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


def _problems_v2(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from _latent_problems(c)
  yield from _width_problems(c)
  if c.topk_method not in (_GREEDY, _GROUPED):
    choices = f'only {_GREEDY!r} or {_GROUPED!r}'
    yield f'topk_method={c.topk_method!r:.80} is not supported, {choices}'
  if c.topk_method == _GROUPED and not (c.n_group and c.topk_group):
    yield f'topk_method={_GROUPED!r} needs n_group and topk_group'


def _problems_v3(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from _latent_problems(c)
  for name in ('n_group', 'topk_group'):
    if getattr(c, name) is None:
      yield f'{name}=None is not supported; all experts are one group with 1'


def _options_v1(c: Values) -> DecoderOptions:
  gates = decoders.gates(c) if c.num_experts_per_tok > 1 else 'raw'
  weight = float(c.router_aux_loss_coef)
  by_sequence = dict(balance_weight=0.0, sequence_balance_weight=weight)
  flags = _sparse(
    c.num_hidden_layers, c.first_k_dense_replace, c.moe_layer_freq
  )
  return decoders.options(
    c,
    TokenChoice(gates=gates),
    decoders.heads(c, biases='all' if c.attention_bias else 'model'),
    losses=by_sequence if c.seq_aux else None,
    moe=dict(
      layers=layers(flags),
      shared_expert=SharedExpertOptions(
        hidden=(c.n_shared_experts or 0) * c.moe_intermediate_size
      ),
    ),
  )


def _latent_options(
  c: Values,
  router: Mapping[str, Any],
  groups: Mapping[str, Any],
  *,
  interleaved: bool = True,
) -> DecoderOptions:
  """The options of a model.

  Args:
    c: The values of config.json.
    router: The options of the router without groups of experts.
    groups: The options of the groups, which count where there are several.
    interleaved: Whether the pairs that rotate are neighbours.
  """
  num_dense = c.first_k_dense_replace
  if groups['expert_groups'] == 1:
    groups = {}
  biased = _BIASED if c.q_lora_rank else _BIASED.removeprefix('query_down, ')
  return decoders.options(
    c,
    TokenChoice(gate_scale=float(c.routed_scaling_factor), **router, **groups),
    LatentOptions(
      num_heads=c.num_attention_heads,
      query_rank=c.q_lora_rank or 0,
      kv_rank=c.kv_lora_rank,
      plain_width=c.qk_nope_head_dim,
      rotary_width=c.qk_rope_head_dim,
      value_width=c.v_head_dim,
      norm_epsilon=_EPSILON,
      biases=biased if c.attention_bias else 'none',
    ),
    moe=dict(
      layers=layers([i >= num_dense for i in range(c.num_hidden_layers)]),
      shared_expert=SharedExpertOptions(
        hidden=c.n_shared_experts * c.moe_intermediate_size
      ),
    ),
    positions=rotary_keys.rotary(c, 10_000.0, interleaved=interleaved),
  )


def _options_v2(c: Values) -> DecoderOptions:
  grouped = c.topk_method == _GROUPED
  return _latent_options(
    c,
    dict(gates='raw'),
    dict(
      expert_groups=c.n_group if grouped else 1,
      chosen_expert_groups=c.topk_group,
      expert_group_score='best',
      outside_expert_groups='zero',
    ),
  )


def _options_v3(c: Values) -> DecoderOptions:
  return _latent_options(
    c,
    dict(gates=_V3_GATES[c.norm_topk_prob], balance_bias_rate=PUBLISHED_RATE),
    dict(
      expert_groups=c.n_group,
      chosen_expert_groups=c.topk_group,
      expert_group_score='two_best',
      outside_expert_groups='minus_infinity',
    ),
    interleaved=c.rope_interleave,
  )


def _describe_v1(o: DecoderOptions) -> dict[str, Any]:
  decided = decoders.describe(o, 'DeepSeekMoE', KEYS_V1)
  router = decoders.token_choice(o)
  first, L = o.sparse.index(True), o.num_layers
  steps = (n for n in range(1, L + 1) if _sparse(L, first, n) == o.sparse)
  if (step := next(steps, None)) is None:
    raise InputError(
      f'its sparse layers {o.moe.layers!r} are not those that one number '
      'divides'
    )
  by_sequence = router.sequence_balance_weight
  return decided | dict(
    n_shared_experts=_num_shared(o) or None,
    first_k_dense_replace=first,
    moe_layer_freq=step,
    norm_topk_prob=decoders.is_renormalized(router),
    aux_loss_alpha=by_sequence or router.balance_weight,
    seq_aux=bool(by_sequence),
  )


def _describe_latent(
  o: DecoderOptions, architecture: str, keys: Keys
) -> dict[str, Any]:
  """The keys that both V2 and V3 have, of a model."""
  decided = decoders.describe(o, architecture, keys, latent=True)
  attention: Any = o.attention
  router = decoders.token_choice(o)
  groups = router.expert_groups
  return decided | dict(
    n_shared_experts=_num_shared(o),
    first_k_dense_replace=o.sparse.index(True),
    n_group=groups,
    topk_group=router.chosen_expert_groups if groups > 1 else 1,
    routed_scaling_factor=router.gate_scale,
    q_lora_rank=attention.query_rank or None,
    kv_lora_rank=attention.kv_rank,
    qk_nope_head_dim=attention.plain_width,
    qk_rope_head_dim=attention.rotary_width,
    v_head_dim=attention.value_width,
  )


def _num_shared(o: DecoderOptions) -> int:
  """The number of shared experts, each as wide as a chosen one.

  Raises:
    ValueError: The shared expert has no multiple of that width.
  """
  shared = o.moe.shared_expert.hidden
  hidden = decoders.expert_of(o).hidden
  if shared % hidden:
    raise InputError(
      f"its shared expert is {shared} wide, no multiple of an expert's {hidden}"
    )
  return shared // hidden


def _describe_v2(o: DecoderOptions) -> dict[str, Any]:
  decided = _describe_latent(o, 'DeepSeek-V2', KEYS_V2)
  method = _GROUPED if decided['n_group'] > 1 else _GREEDY
  return decided | dict(topk_method=method, norm_topk_prob=False)


def _describe_v3(o: DecoderOptions) -> dict[str, Any]:
  decided = _describe_latent(o, 'DeepSeek-V3', KEYS_V3)
  flags = {gates: flag for flag, gates in _V3_GATES.items()}
  gates = decoders.token_choice(o).gates
  if gates not in flags:
    raise InputError(f'its gates are {gates!r}, not one of {sorted(flags)}')
  return decided | dict(
    norm_topk_prob=flags[gates],
    rope_interleave=isinstance(o.positions, Rotary) and o.positions.interleaved,
    num_nextn_predict_layers=0,
  )


def _further_layers(c: Values) -> tuple[str, ...]:
  """The patterns of the tensors of layers behind the last one."""
  L = c.num_hidden_layers
  further = {*range(L, L + c.num_nextn_predict_layers), _PUBLISHED_LAYERS}
  return tuple(
    rf'(^|\.)layers\.{number}\.' for number in further if number >= L
  )


_FFNS: Table = {
  **gated_ffn('ffn', 'mlp'),
  **gated_ffn('moe/shared_expert/ffn', 'mlp.shared_experts'),
  **weight('moe/router/w', 'mlp.gate', 'E M -> M E'),
  **experts(),
}
_LATENT: Table = {
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
  **_FFNS,
}
_BALANCE_BIAS = layer(
  'moe/router/balance_bias', Name('mlp.gate.e_score_correction_bias', 'E')
)
ARCHITECTURES = (
  decoder(
    'deepseek',
    'Deepseek',
    KEYS_V1,
    _problems_v1,
    _options_v1,
    _describe_v1,
    {**ENDS, **BLOCK, **_FFNS},
    needs_code=True,
  ),
  decoder(
    'deepseek_v2',
    'DeepseekV2',
    KEYS_V2,
    _problems_v2,
    _options_v2,
    _describe_v2,
    _LATENT,
  ),
  decoder(
    'deepseek_v3',
    'DeepseekV3',
    KEYS_V3,
    _problems_v3,
    _options_v3,
    _describe_v3,
    {**_LATENT, **_BALANCE_BIAS},
    skipped_tensors=_further_layers,
  ),
)
