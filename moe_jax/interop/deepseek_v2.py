"""transformers' DeepSeek-V2 (arXiv:2405.04434) as a decoder.

The first layers are dense, no token is dropped, and shared experts are one of
their widths together. As transformers 5.24 computes it:

- Gates are probabilities among all experts times `routed_scaling_factor`;
  `norm_topk_prob` is not read, so that true is refused.
- With `topk_method` 'group_limited_greedy' a token chooses groups by their best
  probability, and experts outside have a probability of 0.
- The norms of the short vectors of attention have an epsilon of their own.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.interop import deepseek_keys
from moe_jax.interop.architecture import decoder
from moe_jax.interop.config_keys import Values
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

_GREEDY, _GROUPED = 'greedy', 'group_limited_greedy'
KEYS = deepseek_keys.keys(
  dict(
    vocab_size=102400,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    num_experts_per_tok=None,
    n_routed_experts=64,
    n_shared_experts=2,
    moe_intermediate_size=1407,
    first_k_dense_replace=0,
    n_group=None,
    topk_group=None,
    routed_scaling_factor=1.0,
    kv_lora_rank=512,
  ),
  honoured={'topk_method': (str, _GREEDY)},
  fixed={
    'mlp_bias': (False,),
    'norm_topk_prob': (False, None),
    'scoring_func': ('softmax',),
  },
  spellings={'num_experts': 'n_routed_experts'},
)


def problems(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from deepseek_keys.problems(c)
  if c.hidden_size % c.num_attention_heads:
    yield (
      f'num_attention_heads={c.num_attention_heads} does not divide '
      f'hidden_size={c.hidden_size}, as transformers asks for'
    )
  if c.topk_method not in (_GREEDY, _GROUPED):
    choices = f'only {_GREEDY!r} or {_GROUPED!r}'
    yield f'topk_method={c.topk_method!r:.80} is not supported, {choices}'
  if c.topk_method == _GROUPED and not (c.n_group and c.topk_group):
    yield f'topk_method={_GROUPED!r} needs n_group and topk_group'


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  grouped = c.topk_method == _GROUPED and c.n_group > 1
  router = TokenChoice(
    gates='raw', gate_scale=float(c.routed_scaling_factor), balance_weight=0.0
  )
  return deepseek_keys.options(
    c,
    router,
    groups=dict(
      expert_groups=c.n_group,
      chosen_expert_groups=c.topk_group,
      expert_group_score='best',
      outside_expert_groups='zero',
    )
    if grouped
    else {},
  )


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  decided = deepseek_keys.describe(o, 'DeepSeek-V2')
  grouped = decided['n_group'] > 1
  return decided | dict(
    topk_method=_GROUPED if grouped else _GREEDY, norm_topk_prob=False
  )


ARCHITECTURE = decoder(
  'deepseek_v2',
  'DeepseekV2',
  KEYS,
  problems,
  options,
  describe,
  deepseek_keys.NAMES,
)
