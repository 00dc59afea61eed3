"""From a config to a model: the ConfigDict ends here.

Every check that needs no array is made here or in the dataclasses' own
`__post_init__`, so that a bad config fails before anything compiles.
"""

import ml_collections

from moe_jax.config import unknown
from moe_jax.layers.attention import AttentionConfig
from moe_jax.layers.block import BlockConfig
from moe_jax.layers.ffn import FfnConfig
from moe_jax.layers.initializers import Init
from moe_jax.layers.moe import MoeConfig
from moe_jax.layers.router import RouterConfig
from moe_jax.models.decoder import Decoder, DecoderConfig
from moe_jax.routing import CapacityRule, is_causal

KINDS = ('decoder',)
DTYPES = ('bfloat16', 'float32')


def build(config: ml_collections.ConfigDict) -> Decoder:
  """The model that `config.model` describes.

  `config.model.moe.num_experts=0` gives the dense twin: every sparse
  feed-forward becomes a dense one of width K * F.

  Raises:
    ValueError: A value is unknown or out of range, sizes do not divide, or a
      router leaks the future and `moe.allow_future_leak` is not set.
  """
  model = config.model
  _check(model)
  init = Init(
    kind=model.init.kind,
    scale=model.init.scale,
    embedding_std=model.init.embedding_std,
    num_layers=model.num_layers,
  )
  pattern = sparse_pattern(model.moe.layers, model.num_layers)
  return Decoder(
    DecoderConfig(
      vocab_size=model.vocab_size,
      width=model.width,
      sparse=pattern,
      block=_block(model, init, any(pattern)),
      positions=model.positions,
      max_len=model.max_len or config.data.seq_len,
      tie_embeddings=model.tie_embeddings,
      scan_layers=model.scan_layers,
      remat=model.remat,
      param_dtype=model.param_dtype,
      init=init,
    )
  )


def _check(model) -> None:
  if model.kind not in KINDS:
    raise unknown('model.kind', model.kind, KINDS)
  for name in ('dtype', 'param_dtype'):
    if model[name] not in DTYPES:
      raise unknown(f'model.{name}', model[name], DTYPES)
  if model.vocab_size < 1:
    raise ValueError(
      f"model.vocab_size={model.vocab_size}: 0 stands for the tokenizer's; "
      'set it, or load the data first'
    )
  if model.width < 1 or model.num_heads < 1:
    raise ValueError(
      f'width={model.width} and num_heads={model.num_heads} must be at least 1'
    )
  if not model.head_width and model.width % model.num_heads:
    raise ValueError(
      f'num_heads={model.num_heads} does not divide width={model.width}; set '
      'head_width'
    )


def _block(model, init: Init, has_sparse: bool) -> BlockConfig:
  moe = _moe(model, init)  # also of a dense twin, whose options are checked
  _check_causal(model.moe)
  twin = has_sparse and not model.moe.num_experts
  return BlockConfig(
    attention=AttentionConfig(
      num_heads=model.num_heads,
      head_width=model.head_width or model.width // model.num_heads,
      num_kv_heads=model.num_kv_heads or model.num_heads,
      use_bias=model.use_bias,
      rotary=model.positions == 'rotary',
      rope_theta=model.rope_theta,
      dropout=model.dropout,
      implementation=model.attention,
      dtype=model.dtype,
      param_dtype=model.param_dtype,
      init=init,
    ),
    ffn=_ffn(model, init, model.hidden, model.activation, model.dropout),
    moe=moe if has_sparse and not twin else None,
    twin=_twin(model, init) if twin else None,
    norm=model.norm,
    norm_epsilon=model.norm_epsilon,
    use_bias=model.use_bias,
    dropout=model.dropout,
    extra_ffn=model.moe.extra_ffn,
    dtype=model.dtype,
  )


def sparse_pattern(layers: str, num_layers: int) -> tuple[bool, ...]:
  """Which of L layers are sparse, from one string.

  'all', 'none', 'every N' (layers N-1, 2N-1, ... counted from 0), 'last N',
  or the indices themselves: '1,3'.

  Raises:
    ValueError: The string is none of these, or names a layer not in [0, L).
  """
  L = num_layers
  if L < 1:
    raise ValueError(f'num_layers={L} must be at least 1')
  word, _, number = layers.strip().partition(' ')
  if layers in ('all', 'none'):
    return (layers == 'all',) * L
  if word in ('every', 'last') and number.isdigit() and int(number) > 0:
    n = int(number)
    if n > L:
      raise ValueError(f'moe.layers={layers!r} with num_layers={L}')
    if word == 'every':
      return tuple((i + 1) % n == 0 for i in range(L))
    return tuple(i >= L - n for i in range(L))
  parts = [part.strip() for part in layers.split(',')]
  if not all(part.isdigit() for part in parts):
    raise ValueError(
      f"moe.layers={layers!r} is none of 'all', 'none', 'every N', 'last N', "
      "'1,3'"
    )
  indices = {int(part) for part in parts}
  if max(indices) >= L:
    raise ValueError(f'moe.layers={layers!r} not in [0, num_layers={L})')
  return tuple(i in indices for i in range(L))


def _ffn(model, init, hidden, activation, dropout) -> FfnConfig:
  return FfnConfig(
    hidden=hidden,
    activation=activation,
    use_bias=model.use_bias,
    dropout=dropout,
    dtype=model.dtype,
    param_dtype=model.param_dtype,
    init=init,
  )


def _expert(model, init) -> FfnConfig:
  moe = model.moe
  dropout = moe.expert_dropout if moe.expert_dropout >= 0 else model.dropout
  return _ffn(
    model,
    init,
    moe.hidden or model.hidden,
    moe.activation or model.activation,
    dropout,
  )


def _twin(model, init) -> FfnConfig:
  """The dense layer with the FLOPs per token of the K experts it replaces."""
  expert = _expert(model, init)
  hidden = expert.hidden * model.moe.num_selected
  return _ffn(model, init, hidden, expert.activation, expert.dropout)


def _moe(model, init) -> MoeConfig:
  moe = model.moe
  return MoeConfig(
    router=RouterConfig(
      num_experts=moe.num_experts or moe.num_selected,
      num_selected=moe.num_selected,
      kind=moe.router,
      capacity=CapacityRule(
        rule=moe.capacity_rule,
        factor=moe.capacity_factor,
        rounding=moe.capacity_rounding,
        multiple=moe.capacity_multiple,
        minimum=moe.capacity_minimum,
        slots=moe.capacity_slots,
      ),
      gates=moe.gates,
      slot_priority=moe.slot_priority,
      second_policy=moe.second_policy,
      second_threshold=moe.second_threshold,
      jitter=moe.jitter,
      balance_choices=moe.balance_choices,
      init=init,
    ),
    expert=_expert(model, init),
    group_size=moe.group_size,
    dispatch=moe.dispatch,
    grouped_matmul=moe.grouped_matmul,
  )


def leaks_future(moe: ml_collections.ConfigDict) -> bool:
  """Whether the routers of a `model.moe` section let outputs see later tokens.

  True where slots are handed out so and capacity can bind.
  """
  return moe.num_experts > 0 and not is_causal(
    slot_priority=moe.slot_priority,
    num_selected=moe.num_selected,
    capacity_rule=moe.capacity_rule,
  )


def _check_causal(moe) -> None:
  if leaks_future(moe) and not moe.allow_future_leak:
    raise ValueError(
      f'slot_priority={moe.slot_priority!r} with num_selected='
      f'{moe.num_selected} lets later tokens change earlier outputs wherever '
      "capacity binds; use slot_priority='token_major', or set "
      'moe.allow_future_leak=True and report the run as one that leaks'
    )
