"""OpenMoE (arXiv:2402.01739) as a decoder.

transformers has no class for it; its checkpoints bring their own code, in which
it has LLaMA's `model_type`. As that code computes it:

- Scores of attention are not scaled, and pairs turn by a base of 10000.
- Every `moe_layer_interval`-th layer is sparse, and a dense feed-forward with a
  norm and a residual of its own follows its experts.
- Feed-forwards multiply a SwiGLU, both of whose products are one tensor, by a
  third product.
- Gates are probabilities among all experts. The whole batch competes for slots,
  first choices before second ones, in evaluation as in training. An expert has
  `router_capacity_factor_eval` times an even share of slots in evaluation
  (`quirks.EvenSlots`); here it has as many in training, too.

Unlike there, padding takes no slots, and no token attends to padding at the
beginning of its row. The code turns a token that is generated with a cache by
one position too many; here it turns as in a whole row.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop import decoders, rotary_keys
from moe_jax.interop.architecture import (
  layers,
  period,
  sparse_flags,
  their_activation,
)
from moe_jax.interop.config_keys import (
  AMOUNT,
  OPTIONAL_SIZE,
  POSITIVE,
  RATE,
  SIZE,
  Values,
)
from moe_jax.interop.decoders import BLOCK, ENDS, Table, decoder, layer, weight
from moe_jax.interop.mapping import Name
from moe_jax.interop.quirks import EvenSlots
from moe_jax.layers.experts import Gather
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

_THETA = 10_000.0
_LAST = 0  # the sparse layer of an interval is its last
_ACTIVATIONS = {'swiglu': 'doubly_gated_swiglu'}
_NO_NUMBER = 'the numbers are the same without it'
_OWN_LOSS = 'the loss of a run has no such term'
KEYS = decoders.keys(
  dict(
    vocab_size=32000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.01,
  ),
  honoured={
    'intermediate_size': (SIZE, 11008),
    'head_dim': (OPTIONAL_SIZE, None),
    'num_experts': (SIZE, None),
    'moe_layer_interval': (SIZE, None),
    'router_capacity_factor_eval': (POSITIVE, 2.0),
    'router_min_capacity': (SIZE, 4),
  },
  training={
    'router_capacity_factor_train': (
      POSITIVE,
      1.25,
      'router_capacity_factor_eval',
      'training has the capacity of evaluation; see moe.capacity',
    ),
    'router_noisy_policy': (str | None, None, None, 'see moe.jitter'),
    'router_z_loss_factor': (AMOUNT, 0.0001, ..., ''),
    'dropout_rate': (RATE, 0.0, 0.0, 'the published code has no dropout'),
    'label_smoothing': (RATE, 0.001, 0.0, _OWN_LOSS),
    'z_loss_factor': (AMOUNT, 0.01, 0.0, _OWN_LOSS),
  },
  fixed={
    'attention_bias': (False,),
    'mlp_bias': (False,),
    'mlp_gated': (True,),
    # The published code cannot split its wider products.
    'pretraining_tp': (1,),
    # It drops tokens of one process even if this is false.
    'router_drop_tks': (True,),
  },
  ignored={
    **dict.fromkeys(
      (
        'enable_comm_overlap',
        'enable_hierarchical_alltoall',
        'enable_kernel',
        'enable_load_balance',
        'expert_parallel',
        'load_balance_beam_width',
        'load_balance_group_swap_factor',
        'load_balance_tolerance',
      ),
      _NO_NUMBER,
    ),
    'layer_norm_epsilon': 'the published code reads rms_norm_eps',
  },
  spellings={
    'router_topk': 'num_experts_per_tok',
    'router_aux_loss_factor': 'router_aux_loss_coef',
  },
)


def problems(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  errors = decoders.problems(
    c, rope_types=('default',), activations=_ACTIVATIONS
  )
  yield from errors
  if not errors and (theta := rotary_keys.rotary(c, _THETA).theta) != _THETA:
    yield f'rope_theta={theta} is not supported, only {_THETA}'
  if (num_selected := c.num_experts_per_tok) > 2:
    yield f'router_topk={num_selected} is not supported, only 1 or 2'
  if (interval := c.moe_layer_interval) and interval > c.num_hidden_layers:
    yield (
      f'moe_layer_interval={interval} leaves no layer sparse of '
      f'{c.num_hidden_layers}'
    )


def options(c: Values) -> DecoderOptions:
  """The options of the model."""
  flags = sparse_flags(c.num_hidden_layers, c.moe_layer_interval, _LAST)
  return decoders.options(
    c,
    TokenChoice(gates='raw', slot_priority='choice_major'),
    decoders.heads(c, scale='none'),
    activations=_ACTIVATIONS,
    # In the published code an even load of K choices costs K.
    losses=dict(
      balance_weight=c.num_experts_per_tok * float(c.router_aux_loss_coef),
      z_weight=float(c.router_z_loss_factor),
    ),
    moe=dict(
      layers=layers(flags),
      group_size=-1,
      extra_ffn=True,
      allow_future_leak=True,
      layer_reduce='mean',
      capacity=EvenSlots(
        float(c.router_capacity_factor_eval), c.router_min_capacity
      ),
      dispatch=Gather(),
    ),
  )


def describe(o: DecoderOptions) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  decided = decoders.describe(o, 'OpenMoE', KEYS)
  router, capacity = decoders.token_choice(o), o.moe.capacity
  if not isinstance(capacity, EvenSlots):
    raise InputError(
      f'its capacity is {type(capacity).__name__}, not {EvenSlots.__name__}'
    )
  interval = period(o.sparse, _LAST)
  if interval is None:
    raise InputError(
      f'its sparse layers {o.moe.layers!r} are not the last ones of any '
      'interval'
    )
  K = decided.pop('num_experts_per_tok')
  return decided | dict(
    hidden_act=their_activation(decoders.expert_of(o).activation, _ACTIVATIONS),
    intermediate_size=o.ffn.hidden,
    moe_layer_interval=interval,
    router_topk=K,
    router_capacity_factor_eval=capacity.factor,
    router_min_capacity=capacity.minimum,
    router_aux_loss_factor=router.balance_weight / K,
    router_z_loss_factor=router.z_weight,
    mlp_gated=True,
    router_drop_tks=True,
  )


def _ffn(path: str, module: str) -> Table:
  """A feed-forward whose SwiGLU has one tensor, the linear product first."""
  gate = f'{module}.gate_proj'
  return {
    **weight(f'{path}/w_gate', gate, '(1/2 F) M -> M F'),
    **weight(f'{path}/w_factor', gate, '(0/2 F) M -> M F'),
    **weight(f'{path}/w_in', f'{module}.up_proj', 'F M -> M F'),
    **weight(f'{path}/w_out', f'{module}.down_proj', 'M F -> F M'),
  }


_GATE_TENSOR = 'mlp.experts.wi_gate'
NAMES: Table = {
  **ENDS,
  **BLOCK,
  **weight('extra_ffn_norm/scale', 'pre_extra_mlp_layernorm', 'M'),
  **_ffn('ffn', 'mlp'),
  **_ffn('extra_ffn', 'extra_mlp'),
  **layer('moe/router/w', Name('mlp.gate_weight', 'E M -> M E')),
  **layer('moe/experts/w_gate', Name(_GATE_TENSOR, 'E M (1/2 F) -> E M F')),
  **layer('moe/experts/w_factor', Name(_GATE_TENSOR, 'E M (0/2 F) -> E M F')),
  **layer('moe/experts/w_in', Name('mlp.experts.wi_up', 'E M F')),
  **layer('moe/experts/w_out', Name('mlp.experts.wo', 'E F M')),
}
ARCHITECTURE = decoder(
  'openmoe',
  'OpenMoe',
  KEYS,
  problems,
  options,
  describe,
  NAMES,
  borrowed_type='llama',
  needs_code=True,
)
