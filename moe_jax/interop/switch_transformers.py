"""transformers' Switch Transformer (arXiv:2101.03961) as an encoder-decoder.

Unlike the paper, and as transformers 5.24 computes it:

- An expert has `expert_capacity` slots in every sequence, whatever its length
  (the capacity `Fixed`), so tokens are dropped when a sequence is read whole
  and never when it is decoded token by token.
- Padding takes slots (`quirks.RoutedPadding`), whatever the value of
  `router_ignore_padding_tokens`, as the router has no mask.
- If `tie_word_embeddings` is false, encoder and decoder each have an embedding,
  and the shared one is not read (`encoder_table`).
- If the config asks for no sparse layer, layer 1 is sparse nevertheless.

Jitter, dropout and weights of losses act only in training, there and here.
"""

from typing import Any

from moe_jax.errors import InputError
from moe_jax.interop import config_keys
from moe_jax.interop.architecture import (
  ACTIVATIONS,
  Architecture,
  activation_problems,
  layers,
  period,
  plain_attention,
  sparse_flags,
  their_activation,
)
from moe_jax.interop.config_keys import Keys, Values
from moe_jax.interop.mapping import Name, embedding_tables
from moe_jax.interop.quirks import TransformersEncoderDecoder
from moe_jax.layers.attention import AttentionOptions
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.positions import Relative
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import EncoderDecoderOptions
from moe_jax.models.embeddings import EmbeddingOptions
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.routing.capacity import Fixed

_PAPER = 1  # the sparse layer of a period is the second
KEYS = Keys(
  honoured={
    'vocab_size': (config_keys.SIZE, 32128),
    'd_model': (config_keys.SIZE, 768),
    'd_kv': (config_keys.SIZE, 64),
    'd_ff': (config_keys.SIZE, 2048),
    'expert_capacity': (config_keys.COUNT, 64),
    'num_layers': (config_keys.LAYERS, 12),
    'num_sparse_encoder_layers': (config_keys.COUNT, 3),
    'num_decoder_layers': (config_keys.OPTIONAL_LAYERS, 12),
    'num_sparse_decoder_layers': (config_keys.COUNT, 3),
    'encoder_sparse_step': (config_keys.OPTIONAL_COUNT, None),
    'decoder_sparse_step': (config_keys.OPTIONAL_COUNT, None),
    'num_heads': (config_keys.SIZE, 12),
    'num_experts': (config_keys.COUNT, 8),
    'router_bias': (bool, False),
    'relative_attention_num_buckets': (config_keys.SIZE, 32),
    'relative_attention_max_distance': (config_keys.COUNT, 128),
    'layer_norm_epsilon': (config_keys.POSITIVE, 1e-6),
    'dense_act_fn': (str, 'relu'),
    'feed_forward_proj': (str | None, None),
    'tie_word_embeddings': (bool, True),
  },
  training={
    'dropout_rate': (config_keys.RATE, 0.1, ..., ''),
    'router_jitter_noise': (config_keys.RATE, 0.01, ..., ''),
    'router_z_loss_coef': (config_keys.AMOUNT, 0.001, ..., ''),
    'router_aux_loss_coef': (config_keys.AMOUNT, 0.001, ..., ''),
  },
  fixed={
    **config_keys.COMMON_FIXED,
    'is_encoder_decoder': (True,),
    'is_gated_act': (False,),
    'router_dtype': ('float32',),
    'router_type': ('tokens_masked',),
    'batch_prioritized_routing': (False,),
  },
  ignored=(
    *config_keys.COMMON_IGNORED,
    'add_router_probs',  # transformers does nothing with it
    'initializer_factor',  # the parameters are there
    'n_positions',  # relative positions have no table of places
    'pad_token_id',  # masks say what padding is
    'router_ignore_padding_tokens',  # transformers does nothing with it
  ),
)


def problems(c: Values) -> list[str]:
  """A text for each value of config.json that our models cannot express."""
  errors = activation_problems('dense_act_fn', c.dense_act_fn, ACTIVATIONS)
  if c.expert_capacity < 1:
    errors.append(f'expert_capacity={c.expert_capacity} must be at least 1')
  if c.feed_forward_proj not in (None, c.dense_act_fn):
    errors.append(
      f'feed_forward_proj={c.feed_forward_proj!r} is not dense_act_fn='
      f'{c.dense_act_fn!r}; gated feed-forwards are not supported'
    )
  return errors


def options(c: Values) -> TransformersEncoderDecoder:
  """The options of the model that a config.json describes."""
  decoder = c.num_decoder_layers
  decoder = c.num_layers if decoder is None else decoder
  encoder_sparse = _sparse(
    c.encoder_sparse_step, c.num_layers, c.num_sparse_encoder_layers
  )
  tied = c.tie_word_embeddings
  return TransformersEncoderDecoder(
    vocab_size=c.vocab_size,
    num_layers=decoder,
    encoder=EncoderOptions(c.num_layers, {'moe': {'layers': encoder_sparse}}),
    width=c.d_model,
    attention=AttentionOptions(
      num_heads=c.num_heads, head_width=c.d_kv, scale='none'
    ),
    ffn=FfnOptions(c.d_ff, ACTIVATIONS[c.dense_act_fn]),
    norm=RmsNorm(float(c.layer_norm_epsilon)),
    positions=Relative(
      c.relative_attention_num_buckets, c.relative_attention_max_distance
    ),
    embedding=EmbeddingOptions(
      tie=tied, logits_scale='inverse_sqrt_width' if tied else 'none'
    ),
    dropout=float(c.dropout_rate),
    route_padding=True,
    moe=MoeOptions(
      num_experts=c.num_experts,
      layers=_sparse(
        c.decoder_sparse_step, decoder, c.num_sparse_decoder_layers
      ),
      router=TokenChoice(
        jitter=float(c.router_jitter_noise),
        use_bias=c.router_bias,
        balance_weight=float(c.router_aux_loss_coef),
        z_weight=float(c.router_z_loss_coef),
      ),
      capacity=Fixed(c.expert_capacity),
    ),
  )


def _sparse(step: int | None, num_layers: int, num_sparse: int) -> str:
  if step is None:
    step = num_layers // num_sparse if num_sparse > 0 else num_layers
  return layers(sparse_flags(num_layers, step, _PAPER))


def describe(o: EncoderDecoderOptions) -> dict[str, Any]:
  """The keys and values of config.json for a model; ValueError if none fit."""
  if not o.has_encoder:
    raise InputError('it has no encoder')
  encoder = o.encoder_half
  attention, moe = plain_attention(o, o.width), o.moe
  return dict(
    vocab_size=o.vocab_size,
    d_model=o.width,
    d_kv=attention.head_width,
    d_ff=o.ffn.hidden,
    expert_capacity=getattr(moe.capacity, 'slots', 1),
    num_layers=encoder.num_layers,
    num_decoder_layers=o.num_layers,
    num_sparse_encoder_layers=sum(encoder.sparse),
    num_sparse_decoder_layers=sum(o.sparse),
    encoder_sparse_step=period(encoder.sparse, _PAPER),
    decoder_sparse_step=period(o.sparse, _PAPER),
    num_heads=attention.num_heads,
    num_experts=moe.num_experts,
    router_bias=getattr(moe.router, 'use_bias', False),
    relative_attention_num_buckets=getattr(o.positions, 'buckets', 32),
    relative_attention_max_distance=getattr(o.positions, 'max_distance', 128),
    layer_norm_epsilon=o.norm.epsilon,
    dense_act_fn=their_activation(o.ffn.activation, ACTIVATIONS),
    tie_word_embeddings=o.embedding.tie,
    dropout_rate=o.dropout,
    router_jitter_noise=getattr(moe.router, 'jitter', 0.0),
    is_encoder_decoder=True,
  )


def _stack(half: str) -> dict[str, tuple[Name, ...]]:
  names = {
    f'{half}/relative_positions/table': Name(
      f'{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
      'B H -> H B',
    ),
    f'{half}/final_norm/scale': Name(f'{half}.final_layer_norm.weight', 'M'),
  }

  def layer(path, module, form):
    tensor = f'{half}.block.{{layer}}.layer.{module}.weight'
    names[f'{half}/layer/{path}'] = Name(tensor, form)

  def attention(path, number, module):
    layer(f'{path}_norm/scale', f'{number}.layer_norm', 'M')
    for name, letter in (('query', 'q'), ('key', 'k'), ('value', 'v')):
      layer(
        f'{path}/w_{name}', f'{number}.{module}.{letter}', '(H D) M -> M H D'
      )
    layer(f'{path}/w_out', f'{number}.{module}.o', 'M (H D) -> H D M')

  attention('attention', 0, 'SelfAttention')
  last = 1
  if half == 'decoder':
    attention('cross_attention', 1, 'EncDecAttention')
    last = 2
  layer('ffn_norm/scale', f'{last}.layer_norm', 'M')
  for path, module in (
    ('ffn', f'{last}.mlp'),
    ('moe/experts', f'{last}.mlp.experts.expert_{{expert}}'),
  ):
    layer(f'{path}/w_in', f'{module}.wi', 'F M -> M F')
    layer(f'{path}/w_out', f'{module}.wo', 'M F -> F M')
  router = f'{last}.mlp.router.classifier'
  layer('moe/router/w', router, 'E M -> M E')
  bias = f'{half}.block.{{layer}}.layer.{router}.bias'
  names[f'{half}/layer/moe/router/b'] = Name(bias, 'E')
  return {path: (name,) for path, name in names.items()}


ARCHITECTURES = (
  Architecture(
    model_type='switch_transformers',
    classes=(
      'SwitchTransformersForConditionalGeneration',
      'SwitchTransformersModel',
    ),
    keys=KEYS,
    problems=problems,
    options=options,
    describe=describe,
    suits=lambda o: o.has_encoder and isinstance(o.positions, Relative),
    fills_gaps=True,
    names={**embedding_tables(), **_stack('encoder'), **_stack('decoder')},
  ),
)
