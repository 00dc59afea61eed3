"""From a config to a model: the ConfigDict ends here.

Every check that needs no array is made here or in the dataclasses' own
`__post_init__`, so that a bad config fails before anything compiles.
"""

import dataclasses

import ml_collections

from moe_jax.config import merge, unknown
from moe_jax.layers.attention import AttentionConfig
from moe_jax.layers.attention.cache import KVCache
from moe_jax.layers.block import BlockConfig
from moe_jax.layers.ffn import FfnConfig
from moe_jax.layers.initializers import Init
from moe_jax.layers.lstm import LstmConfig
from moe_jax.layers.moe import MoeConfig
from moe_jax.layers.norms import NormConfig
from moe_jax.layers.routers.router_config import RouterConfig
from moe_jax.models import classifiers
from moe_jax.models.adaptive import AdaptiveMixture
from moe_jax.models.causality import check_causal
from moe_jax.models.decoder import Decoder, DecoderConfig
from moe_jax.models.deep_moe import DeepMoe
from moe_jax.models.embeddings import EmbeddingConfig
from moe_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.lstm_lm import LstmCache, LstmLm, LstmLmConfig
from moe_jax.models.pattern import sparse_pattern
from moe_jax.models.stack import StackConfig
from moe_jax.parallel.exchange import ExchangeConfig
from moe_jax.partitioning import make_rules
from moe_jax.routing import CapacityRule

# Kinds whose inputs are no tokens, but examples with a class.
OF_FEATURES = classifiers.BUILDERS
KINDS = ('decoder', 'encoder_decoder', 'lstm', *OF_FEATURES)
DTYPES = ('bfloat16', 'float32')
ATTENTION_SCALES = {'head_width': 0.0, 'none': 1.0}
Model = Decoder | EncoderDecoder | LstmLm | AdaptiveMixture | DeepMoe
Cache = KVCache | LstmCache  # what a model that generates keeps between steps


def build(config: ml_collections.ConfigDict) -> Model:
  """The model that `config.model` describes.

  `config.model.moe.num_experts=0` gives the dense twin: every sparse
  feed-forward becomes a dense one of width K * F.

  Raises:
    ValueError: A value is unknown or out of range, sizes do not divide, or a
      router leaks the future and `moe.allow_future_leak` is not set.
  """
  model = config.model
  _check(model)
  if model.kind in OF_FEATURES:
    return OF_FEATURES[model.kind](model, _init(model))
  embedding = _embedding(config, model.max_len or config.data.seq_len)
  exchange = _exchange(config)
  if model.kind == 'lstm':
    lstm = LstmLm(_lstm_lm(model, embedding, exchange))
    check_causal(model.moe)
    return lstm
  decoder = _stack(model, exchange)
  check_causal(model.moe)
  if model.kind == 'decoder':
    return Decoder(DecoderConfig(embedding, decoder))
  cross = dataclasses.replace(
    decoder.block.attention, causal=False, rotary=False, window=0, cross=True
  )
  block = dataclasses.replace(decoder.block, cross_attention=cross)
  decoder = dataclasses.replace(decoder, block=block)
  encoder = _stack(_encoders(config).model, exchange)
  attention = dataclasses.replace(
    encoder.block.attention, causal=False, window=0
  )
  block = dataclasses.replace(encoder.block, attention=attention)
  encoder = dataclasses.replace(encoder, block=block)
  return EncoderDecoder(EncoderDecoderConfig(embedding, encoder, decoder))


def _check(model) -> None:
  if model.kind not in KINDS:
    raise unknown('model.kind', model.kind, KINDS)
  for name in ('dtype', 'param_dtype'):
    if model[name] not in DTYPES:
      raise unknown(f'model.{name}', model[name], DTYPES)
  if model.attention_scale not in ATTENTION_SCALES:
    raise unknown('attention_scale', model.attention_scale, ATTENTION_SCALES)
  if model.vocab_size < 1:
    raise ValueError(
      f"model.vocab_size={model.vocab_size}: 0 stands for the tokenizer's; "
      'set it, or load the data first'
    )
  if model.kind in OF_FEATURES and not model.feature_shape:
    raise ValueError(
      f'model.feature_shape={tuple(model.feature_shape)}: () stands for the '
      "data's; set it, or load the data first"
    )
  if model.width < 1 or model.num_heads < 1:
    raise ValueError(
      f'width={model.width} and num_heads={model.num_heads} must be at least 1'
    )
  for name in ('num_heads', 'encoder_heads'):
    heads = model[name]
    if not model.head_width and heads and model.width % heads:
      raise ValueError(
        f'{name}={heads} does not divide width={model.width}; set head_width'
      )


def _lstm_lm(
  model, embedding: EmbeddingConfig, exchange: ExchangeConfig
) -> LstmLmConfig:
  """Layers that `moe.layers` names are feed-forward, the others LSTMs."""
  if model.moe.extra_ffn or model.remat != 'none':
    raise ValueError(
      f"model.kind='lstm' with moe.extra_ffn={model.moe.extra_ffn} and "
      f"remat={model.remat!r}: it knows neither; leave them False and 'none'"
    )
  init = _init(model)
  sparse = sparse_pattern(model.moe.layers, model.num_layers)
  moe = _moe(model, init, exchange)  # also of a twin, to be checked
  depth = model.lstm.twin_depth
  # Each of several hidden layers is as wide as an expert, one alone as K.
  twin = _twin(model, init) if depth == 1 else _expert(model, init)
  has_experts = any(sparse) and model.moe.num_experts > 0
  return LstmLmConfig(
    embedding=embedding,
    sparse=sparse,
    lstm=LstmConfig(
      hidden=model.lstm.hidden or model.width,
      forget_bias=model.lstm.forget_bias,
      unroll=model.lstm.unroll,
      dtype=model.dtype,
      param_dtype=model.param_dtype,
      init=init,
    ),
    moe=moe if has_experts else None,
    twin=twin if any(sparse) and not has_experts else None,
    twin_depth=depth,
    dropout=model.dropout,
  )


def _encoders(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config with what differs in the encoder in its place."""
  m = config.model
  changes = dict(
    num_layers=m.num_encoder_layers or m.num_layers,
    num_heads=m.encoder_heads or m.num_heads,
    # Fewer kv heads are the decoder's, whose cache they shorten.
    num_kv_heads=0,
    hidden=m.encoder_hidden or m.hidden,
    moe=dict(
      layers=m.moe.encoder_layers or m.moe.layers,
      slot_priority=m.moe.encoder_slot_priority or m.moe.slot_priority,
      # Layers are counted anew, and their tables are other ones.
      router_seed=m.moe.router_seed + 1,
    ),
  )
  return merge(config, {'model': changes})


def _init(model) -> Init:
  return Init(
    kind=model.init.kind,
    scale=model.init.scale,
    embedding_std=model.init.embedding_std,
    num_layers=model.num_layers,
  )


def _embedding(config, max_len: int) -> EmbeddingConfig:
  model, rules = config.model, make_rules(config.sharding.to_dict())
  return EmbeddingConfig(
    vocab_size=model.vocab_size,
    width=model.width,
    positions=model.positions,
    max_len=max_len,
    position_offset=model.position_offset,
    tie_embeddings=model.tie_embeddings,
    embedding_scale=model.embedding_scale,
    logits_scale=model.logits_scale,
    dropout=model.dropout,
    dtype=model.dtype,
    param_dtype=model.param_dtype,
    init=_init(model),
    batch_axes=rules['batch'],
    vocab_axes=rules['vocab'],
  )


def _stack(model, exchange: ExchangeConfig) -> StackConfig:
  """A causal stack without cross-attention."""
  pattern = sparse_pattern(model.moe.layers, model.num_layers)
  return StackConfig(
    sparse=pattern,
    block=_block(model, _init(model), any(pattern), exchange),
    relative_buckets=(
      model.relative_buckets if model.positions == 'relative' else 0
    ),
    relative_max_distance=model.relative_max_distance,
    scan_layers=model.scan_layers,
    remat=model.remat,
  )


def _block(
  model, init: Init, has_sparse: bool, exchange: ExchangeConfig
) -> BlockConfig:
  moe = _moe(
    model, init, exchange
  )  # also of a dense twin, whose options are checked
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
      window=model.sliding_window,
      scale=ATTENTION_SCALES[model.attention_scale],
      implementation=model.attention,
      dtype=model.dtype,
      param_dtype=model.param_dtype,
      init=init,
    ),
    ffn=_ffn(model, init, model.hidden, model.activation, model.dropout),
    moe=moe if has_sparse and not twin else None,
    twin=_twin(model, init) if twin else None,
    norm=NormConfig(
      kind=model.norm,
      epsilon=model.norm_epsilon,
      use_bias=model.use_bias,
      use_scale=model.norm_scale,
    ),
    dropout=model.dropout,
    extra_ffn=model.moe.extra_ffn,
    dtype=model.dtype,
  )


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


def _exchange(config: ml_collections.ConfigDict) -> ExchangeConfig:
  """How rows travel, from `config.model.moe` and the table of axes."""
  moe, rules = config.model.moe, make_rules(config.sharding.to_dict())
  return ExchangeConfig(
    kind=moe.exchange,
    chunks=moe.exchange_chunks,
    dtype=moe.exchange_dtype,
    groups=rules['batch'],
    experts=rules['expert'],
    hidden=rules['expert_mlp'],
  )


def _moe(model, init, exchange: ExchangeConfig) -> MoeConfig:
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
      use_bias=moe.router_bias,
      balance_bias_rate=moe.balance_bias_rate,
      hash_of=moe.hash_of,
      seed=moe.router_seed,
      served_by=moe.served_by,
      branching=moe.branching if moe.num_experts else 0,
      branches_selected=moe.branches_selected if moe.num_experts else 1,
      init=init,
    ),
    expert=_expert(model, init),
    group_size=moe.group_size,
    dispatch=moe.dispatch,
    grouped_matmul=moe.grouped_matmul,
    route_padding=moe.route_padding,
    output_masking=moe.output_masking,
    exchange=exchange,
  )
