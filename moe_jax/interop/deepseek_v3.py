"""transformers' DeepSeek-V3 (arXiv:2412.19437) as a decoder.

Moonlight and Kimi-K2 are such models, too. The first layers are dense, no token
is dropped, and shared experts are one of their widths together. As transformers
5.24 computes it:

- A token chooses by the sigmoid of each logit plus the balancing bias of the
  expert, first groups by the sum of their two best, then experts in them.
- Gates are sigmoids without the bias, divided by their sum plus 1e-20 if
  `norm_topk_prob` is true, times `routed_scaling_factor`.
- Layers behind the last one, which predict further tokens, are not read.

The bias is no parameter but the state of a router (`models/router_state.py`),
which training moves by the published rate unless the run's config has another.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop import decoder_keys, deepseek_keys
from moe_jax.interop.architecture import decoder
from moe_jax.interop.config_keys import COUNT, Values
from moe_jax.interop.decoder_names import Table, layer
from moe_jax.interop.mapping import Name
from moe_jax.layers.positions import Rotary
from moe_jax.layers.routers import TokenChoice
from moe_jax.layers.routers.balancing import PUBLISHED_RATE
from moe_jax.models import DecoderOptions

# transformers leaves layer 61 out of every checkpoint, as DeepSeek-V3's own has
# it behind its 61 layers.
_PUBLISHED_LAYERS = 61
_GATES = {True: 'sigmoid_renormalized', False: 'sigmoid'}
KEYS = deepseek_keys.keys(
  dict(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    max_position_embeddings=4096,
    num_experts_per_tok=8,
    n_routed_experts=256,
    n_shared_experts=1,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    kv_lora_rank=512,
  ),
  honoured={'norm_topk_prob': (bool, True), 'rope_interleave': (bool, True)},
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


def problems(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from deepseek_keys.problems(c)
  for name in ('n_group', 'topk_group'):
    if getattr(c, name) is None:
      yield f'{name}=None is not supported; all experts are one group with 1'


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  router = TokenChoice(
    gates=_GATES[c.norm_topk_prob],
    gate_scale=float(c.routed_scaling_factor),
    balance_bias_rate=PUBLISHED_RATE,
  )
  return deepseek_keys.options(
    c,
    router,
    groups=dict(
      expert_groups=c.n_group,
      chosen_expert_groups=c.topk_group,
      expert_group_score='two_best',
      outside_expert_groups='minus_infinity',
    )
    if c.n_group > 1
    else {},
    interleaved=c.rope_interleave,
  )


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  decided = deepseek_keys.describe(o, 'DeepSeek-V3')
  flags = {gates: flag for flag, gates in _GATES.items()}
  gates = decoder_keys.token_choice(o).gates
  if gates not in flags:
    raise InputError(f'its gates are {gates!r}, not one of {sorted(flags)}')
  return decided | dict(
    norm_topk_prob=flags[gates],
    rope_interleave=isinstance(o.positions, Rotary) and o.positions.interleaved,
    num_nextn_predict_layers=0,
  )


def further_layers(c: Values) -> tuple[str, ...]:
  """The patterns of the tensors of layers behind the last one."""
  L = c.num_hidden_layers
  further = {*range(L, L + c.num_nextn_predict_layers), _PUBLISHED_LAYERS}
  return tuple(
    rf'(^|\.)layers\.{number}\.' for number in further if number >= L
  )


NAMES: Table = {
  **deepseek_keys.NAMES,
  **layer(
    'moe/router/balance_bias',
    Name('mlp.gate.e_score_correction_bias', 'E'),
  ),
}
ARCHITECTURE = decoder(
  'deepseek_v3',
  'DeepseekV3',
  KEYS,
  problems,
  options,
  describe,
  NAMES,
  skipped_tensors=further_layers,
)
