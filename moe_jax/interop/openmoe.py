"""OpenMoE (arXiv:2402.01739) as a decoder.

transformers has no class for it; its checkpoints bring their own code, in which
it has LLaMA's `model_type`. As that code computes it:

- Scores of attention are not scaled, and rotary positions have the base 10000.
- Every `moe_layer_interval`-th layer is sparse, and a dense feed-forward with a
  norm and a residual of its own follows its experts.
- The hidden values of a feed-forward are a SwiGLU, whose two kernels are one
  tensor, times a third linear function of the input.
- Gates are probabilities among all experts. The whole batch competes for slots,
  first choices before second ones, in evaluation as in training. An expert has
  `router_capacity_factor_eval` times an even share of slots in evaluation
  (`quirks.EvenSlots`); here it has as many in training, too.

Unlike in that code, padding takes no slots, and no token attends to padding at
the beginning of its row. The code rotates a token that is generated with a
cache by one position too many; here it rotates as in a whole row.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop import decoders, rotary_keys
from moe_jax.interop.architecture import period, sparse_flags
from moe_jax.interop.config_keys import AMOUNT, POSITIVE, RATE, SIZE, Values
from moe_jax.interop.decoders import layer, weight
from moe_jax.interop.mapping import Names
from moe_jax.interop.quirks import EvenSlots
from moe_jax.layers.experts import Gather
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions

_THETA = 10_000.0
_LAST = 0  # the sparse layer of an interval is its last
# Keys on which no number of the model depends; instead of layer_norm_epsilon
# the published code reads rms_norm_eps.
_IGNORED = """
  enable_comm_overlap enable_hierarchical_alltoall enable_kernel
  enable_load_balance expert_parallel load_balance_beam_width
  load_balance_group_swap_factor load_balance_tolerance layer_norm_epsilon
"""
_OWN_LOSS = 'the loss of a run has no such term'
KEYS = decoders.keys(
  dict(
    head_dim=None,
    intermediate_size=11008,
    num_experts=None,
    router_aux_loss_coef=0.01,
  ),
  honoured={
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
    # Other values would split products, which the published code cannot do for
    # its wider kernels.
    'pretraining_tp': (1,),
    # False is refused: in a single process the published code drops tokens
    # nevertheless.
    'router_drop_tks': (True,),
  },
  ignored=_IGNORED.split(),
  spellings={
    'router_topk': 'num_experts_per_tok',
    'router_aux_loss_factor': 'router_aux_loss_coef',
  },
)


def _problems(c: Values) -> Iterator[str]:
  theta = rotary_keys.parameters_of(c)[1]['rope_theta']
  if theta != _THETA:
    yield f'rope_theta={theta} is not supported, only {_THETA}'
  if (num_selected := c.num_experts_per_tok) > 2:
    yield f'router_topk={num_selected} is not supported, only 1 or 2'


def _sparse(c: Values) -> tuple[bool, ...]:
  # A missing interval, which is refused, is None.
  return sparse_flags(c.num_hidden_layers, c.moe_layer_interval or 1, _LAST)


def _options(c: Values) -> dict[str, Any]:
  capacity = EvenSlots(
    float(c.router_capacity_factor_eval), c.router_min_capacity
  )
  return dict(
    router=TokenChoice(gates='raw', slot_priority='choice_major'),
    attention=decoders.heads(c, scale='none'),
    # In the published code the balance loss of an even load of K choices is K,
    # and here it is 1, so its weight here is K times the published one.
    losses=dict(
      balance_weight=c.num_experts_per_tok * float(c.router_aux_loss_coef),
      z_weight=float(c.router_z_loss_factor),
    ),
    moe=dict(
      group_size=-1,
      extra_ffn=True,
      allow_future_leak=True,
      layer_reduce='mean',
      capacity=capacity,
      dispatch=Gather(),
    ),
  )


def _describe(o: DecoderOptions) -> dict[str, Any]:
  router, capacity, K = o.moe.router, o.moe.capacity, o.moe.num_selected
  if not isinstance(capacity, EvenSlots):
    raise InputError(
      f'its capacity is {type(capacity).__name__}, not {EvenSlots.__name__}'
    )
  return dict(
    intermediate_size=o.ffn.hidden,
    moe_layer_interval=period(o.sparse, _LAST),
    router_topk=K,
    router_capacity_factor_eval=capacity.factor,
    router_min_capacity=capacity.minimum,
    router_aux_loss_factor=getattr(router, 'balance_weight', 0.0) / K,
    router_z_loss_factor=getattr(router, 'z_weight', 0.0),
    mlp_gated=True,
    router_drop_tks=True,
  )


def _ffn(path: str, module: str) -> Names:
  """The table entries of a feed-forward whose SwiGLU has one fused tensor.

  `path` is the feed-forward's path in our layer, `module` its name in theirs.
  The first half of the fused tensor is the linear kernel.
  """
  gate = f'{module}.gate_proj'
  return {
    **weight(f'{path}/w_gate', gate, '(1/2 F) M -> M F'),
    **weight(f'{path}/w_factor', gate, '(0/2 F) M -> M F'),
    **weight(f'{path}/w_in', f'{module}.up_proj', 'F M -> M F'),
    **weight(f'{path}/w_out', f'{module}.down_proj', 'M F -> F M'),
  }


_GATE = 'mlp.experts.wi_gate'
ARCHITECTURES = (
  decoders.decoder(
    'openmoe',
    'OpenMoe',
    KEYS,
    {
      **decoders.DECODER,
      **weight('extra_ffn_norm/scale', 'pre_extra_mlp_layernorm', 'M'),
      **_ffn('ffn', 'mlp'),
      **_ffn('extra_ffn', 'extra_mlp'),
      **layer('moe/router/w', ('mlp.gate_weight', 'E M -> M E')),
      **layer('moe/experts/w_gate', (_GATE, 'E M (1/2 F) -> E M F')),
      **layer('moe/experts/w_factor', (_GATE, 'E M (0/2 F) -> E M F')),
      **layer('moe/experts/w_in', ('mlp.experts.wi_up', 'E M F')),
      **layer('moe/experts/w_out', ('mlp.experts.wo', 'E F M')),
    },
    options=_options,
    describe=_describe,
    problems=_problems,
    sparse=_sparse,
    rope_types=('default',),
    activations={'swiglu': 'doubly_gated_swiglu'},
    borrowed_type='llama',
    needs_code=True,
  ),
)
