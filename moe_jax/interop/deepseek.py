"""DeepSeekMoE-16B (arXiv:2401.06066) as a decoder.

transformers has no class for it; its checkpoints bring their own code. No token
is dropped. As that code computes it:

- Attention is LLaMA's, and shared experts are one of their widths together.
- From `first_k_dense_replace` on, the layers whose number `moe_layer_freq`
  divides are sparse.
- Gates are probabilities among all experts. With `norm_topk_prob`, which the
  published checkpoints do not have, several of a token are divided by their
  sum.
- In training each sequence has its own balance loss, or with `seq_aux` false
  the whole batch has one.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop import decoder_keys, deepseek_keys
from moe_jax.interop.architecture import decoder
from moe_jax.interop.config_keys import COUNT, OPTIONAL_SIZE, SIZE, Values
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

KEYS = decoder_keys.keys(
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


def problems(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from decoder_keys.problems(c, rope_types=('default',))
  if c.hidden_size % c.num_attention_heads:
    yield (
      f'num_attention_heads={c.num_attention_heads} does not divide '
      f'hidden_size={c.hidden_size}'
    )
  first, step = c.first_k_dense_replace, c.moe_layer_freq
  if not any(_sparse(c.num_hidden_layers, first, step)):
    yield (
      f'first_k_dense_replace={first} and moe_layer_freq={step} leave no layer '
      f'sparse of {c.num_hidden_layers}'
    )


def _sparse(num_layers: int, first: int, step: int) -> tuple[bool, ...]:
  """Whether each layer is sparse."""
  return tuple(i >= first and i % step == 0 for i in range(num_layers))


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  several = c.num_experts_per_tok > 1
  base_options = decoder_keys.options(
    c,
    ffn_hidden=c.intermediate_size,
    num_experts=c.n_routed_experts,
    router=TokenChoice(gates=decoder_keys.gates(c) if several else 'raw'),
    attention=decoder_keys.heads(
      c, biases='all' if c.attention_bias else 'model'
    ),
    moe=dict(
      layers=decoder_keys.layers(
        _sparse(c.num_hidden_layers, c.first_k_dense_replace, c.moe_layer_freq)
      ),
      expert=FeedForwardExpert(hidden=c.moe_intermediate_size),
      shared_expert=SharedExpertOptions(
        hidden=(c.n_shared_experts or 0) * c.moe_intermediate_size
      ),
    ),
  )
  if not c.seq_aux:
    return base_options
  router = decoder_keys.token_choice(base_options)
  router = dataclasses.replace(
    router, balance_weight=0.0, sequence_balance_weight=router.balance_weight
  )
  return dataclasses.replace(
    base_options, moe=dataclasses.replace(base_options.moe, router=router)
  )


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  decided = decoder_keys.describe(o, 'DeepSeekMoE')
  attention, moe = decoder_keys.plain_heads(o), decoder_keys.moe_options(o)
  router = decoder_keys.token_choice(o)
  first, L = o.sparse.index(True), o.num_layers
  steps = (n for n in range(1, L + 1) if _sparse(L, first, n) == o.sparse)
  if (step := next(steps, None)) is None:
    raise InputError(
      f'its sparse layers {moe.layers!r} are not those that one number divides'
    )
  by_sequence = router.sequence_balance_weight
  return decided | dict(
    intermediate_size=o.ffn.hidden,
    moe_intermediate_size=decoder_keys.expert_of(o).hidden,
    n_routed_experts=moe.num_experts,
    n_shared_experts=deepseek_keys.num_shared(o) or None,
    first_k_dense_replace=first,
    moe_layer_freq=step,
    norm_topk_prob=decoder_keys.is_renormalized(router),
    attention_bias=attention.has_bias('query', use_bias=False),
    aux_loss_alpha=by_sequence or router.balance_weight,
    seq_aux=bool(by_sequence),
  )


NAMES: Table = {
  **ENDS,
  **BLOCK,
  **gated_ffn('ffn', 'mlp'),
  **gated_ffn('moe/shared_expert/ffn', 'mlp.shared_experts'),
  **weight('moe/router/w', 'mlp.gate', 'E M -> M E'),
  **experts(),
}
ARCHITECTURE = decoder(
  'deepseek',
  'Deepseek',
  KEYS,
  problems,
  options,
  describe,
  NAMES,
  needs_code=True,
)
