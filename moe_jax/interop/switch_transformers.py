"""transformers' Switch Transformer (arXiv:2101.03961) as an encoder-decoder.

Unlike the paper, and as transformers 5.24 computes it:

- An expert has `expert_capacity` slots in every sequence, whatever its length
  (`capacity_rule='fixed'`), so tokens are dropped when a sequence is read whole
  and never when it is decoded token by token.
- Padding takes slots (`route_padding`), whatever
  `router_ignore_padding_tokens` says: its router knows no mask.
- Where `tie_word_embeddings` is false, the halves have an embedding each, and
  what they would share is not read (`EmbeddingConfig.encoder_table`).
- With no sparse layer asked for, layer 1 is sparse nevertheless.

Jitter, dropout and the losses' weights act in training alone, and do here too.
"""

from typing import Any

from moe_jax.interop.architecture import (
  Architecture,
  Settings,
  activation,
  is_sparse,
  layers,
  period,
  written,
)
from moe_jax.interop.config_keys import (
  COMMON_FIXED,
  COMMON_IGNORED,
  Keys,
  Values,
)
from moe_jax.interop.mapping import Name
from moe_jax.models import EncoderDecoderConfig

_ACTIVATIONS = {
  'relu': 'relu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}
_PAPER = 1  # the sparse layer of a period is the second
KEYS = Keys(
  honoured={
    'vocab_size': (int, 32128),
    'd_model': (int, 768),
    'd_kv': (int, 64),
    'd_ff': (int, 2048),
    'expert_capacity': (int, 64),
    'num_layers': (int, 12),
    'num_sparse_encoder_layers': (int, 3),
    'num_decoder_layers': (int | None, 12),
    'num_sparse_decoder_layers': (int, 3),
    'encoder_sparse_step': (int | None, None),
    'decoder_sparse_step': (int | None, None),
    'num_heads': (int, 12),
    'num_experts': (int, 8),
    'router_bias': (bool, False),
    'relative_attention_num_buckets': (int, 32),
    'relative_attention_max_distance': (int, 128),
    'layer_norm_epsilon': (float, 1e-6),
    'dense_act_fn': (str, 'relu'),
    'feed_forward_proj': (str | None, None),
    'tie_word_embeddings': (bool, True),
  },
  training={
    'dropout_rate': (float, 0.1, ..., ''),
    'router_jitter_noise': (float, 0.01, ..., ''),
    'router_z_loss_coef': (float, 0.001, ..., ''),
    'router_aux_loss_coef': (float, 0.001, ..., ''),
  },
  fixed={
    **COMMON_FIXED,
    'is_encoder_decoder': (True,),
    'is_gated_act': (False,),
    'router_dtype': ('float32',),
    'router_type': ('tokens_masked',),
    'batch_prioritized_routing': (False,),
  },
  ignored={
    **COMMON_IGNORED,
    'add_router_probs': 'transformers does nothing with it',
    'initializer_factor': 'the parameters are there',
    'n_positions': 'relative positions have no table of places',
    'pad_token_id': 'masks say what padding is',
    'router_ignore_padding_tokens': 'transformers does nothing with it',
  },
)


def settings(c: Values) -> tuple[Settings, list[str]]:
  """Our `model` section, and what is wrong."""
  problems: list[str] = []
  if c.expert_capacity < 1:
    problems.append(f'expert_capacity={c.expert_capacity} must be at least 1')
  if c.feed_forward_proj not in (None, c.dense_act_fn):
    problems.append(
      f'feed_forward_proj={c.feed_forward_proj!r} is not dense_act_fn='
      f'{c.dense_act_fn!r}; gated feed-forwards are not supported'
    )
  decoder = c.num_layers if c.num_decoder_layers is None else (
    c.num_decoder_layers
  )  # fmt: skip
  return dict(
    kind='encoder_decoder',
    vocab_size=c.vocab_size,
    num_layers=decoder,
    num_encoder_layers=c.num_layers,
    width=c.d_model,
    num_heads=c.num_heads,
    head_width=c.d_kv,
    hidden=c.d_ff,
    activation=activation(
      c.dense_act_fn, _ACTIVATIONS, 'dense_act_fn', problems
    ),
    norm_epsilon=float(c.layer_norm_epsilon),
    positions='relative',
    relative_buckets=c.relative_attention_num_buckets,
    relative_max_distance=c.relative_attention_max_distance,
    attention_scale='none',
    tie_embeddings=c.tie_word_embeddings,
    logits_scale='inverse_sqrt_width' if c.tie_word_embeddings else 'none',
    dropout=float(c.dropout_rate),
    moe=dict(
      num_experts=c.num_experts,
      layers=_sparse(
        c.decoder_sparse_step, decoder, c.num_sparse_decoder_layers
      ),
      encoder_layers=_sparse(
        c.encoder_sparse_step, c.num_layers, c.num_sparse_encoder_layers
      ),
      jitter=float(c.router_jitter_noise),
      router_bias=c.router_bias,
      route_padding=True,
      capacity_rule='fixed',
      capacity_slots=c.expert_capacity,
      balance_weight=float(c.router_aux_loss_coef),
      z_weight=float(c.router_z_loss_coef),
    ),
  ), problems


def _sparse(step: int | None, num_layers: int, num_sparse: int) -> str:
  if step is None:
    step = num_layers // num_sparse if num_sparse > 0 else num_layers
  sparse = [i for i in range(num_layers) if is_sparse(i, step, _PAPER)]
  return layers(sparse, num_layers)


def describe(c: EncoderDecoderConfig) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  block, moe = c.decoder.block, c.moe
  if moe is None:
    raise ValueError('it is dense; Switch has experts')
  sparse = dict(encoder=c.encoder.sparse, decoder=c.decoder.sparse)
  steps = {half: period(flags, _PAPER) for half, flags in sparse.items()}
  if None in steps.values():
    raise ValueError(f'sparse layers {sparse} are not those of any sparse step')
  return dict(
    vocab_size=c.vocab_size,
    d_model=c.embedding.width,
    d_kv=block.attention.head_width,
    d_ff=block.ffn.hidden,
    expert_capacity=max(moe.router.capacity.slots, 1),
    num_layers=len(c.encoder.sparse),
    num_decoder_layers=len(c.decoder.sparse),
    num_sparse_encoder_layers=sum(c.encoder.sparse),
    num_sparse_decoder_layers=sum(c.decoder.sparse),
    encoder_sparse_step=steps['encoder'],
    decoder_sparse_step=steps['decoder'],
    num_heads=block.attention.num_heads,
    num_experts=moe.router.num_experts,
    router_bias=moe.router.use_bias,
    relative_attention_num_buckets=c.decoder.relative_buckets,
    relative_attention_max_distance=c.decoder.relative_max_distance,
    layer_norm_epsilon=block.norm.epsilon,
    dense_act_fn=written(block.ffn.activation, _ACTIVATIONS),
    tie_word_embeddings=c.embedding.tie_embeddings,
    dropout_rate=block.dropout,
    router_jitter_noise=moe.router.jitter,
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

  def layer(path, theirs, form):
    theirs = f'{half}.block.{{layer}}.layer.{theirs}.weight'
    names[f'{half}/layer/{path}'] = Name(theirs, form)

  def attention(ours, number, theirs):
    layer(f'{ours}_norm/scale', f'{number}.layer_norm', 'M')
    for name, letter in (('query', 'q'), ('key', 'k'), ('value', 'v')):
      layer(
        f'{ours}/w_{name}', f'{number}.{theirs}.{letter}', '(H D) M -> M H D'
      )
    layer(f'{ours}/w_out', f'{number}.{theirs}.o', 'M (H D) -> H D M')

  attention('attention', 0, 'SelfAttention')
  last = 1
  if half == 'decoder':
    attention('cross_attention', 1, 'EncDecAttention')
    last = 2
  layer('ffn_norm/scale', f'{last}.layer_norm', 'M')
  for ours, theirs in (
    ('ffn', f'{last}.mlp'),
    ('moe/experts', f'{last}.mlp.experts.expert_{{expert}}'),
  ):
    layer(f'{ours}/w_in', f'{theirs}.wi', 'F M -> M F')
    layer(f'{ours}/w_out', f'{theirs}.wo', 'M F -> F M')
  router = f'{last}.mlp.router.classifier'
  layer('moe/router/w', router, 'E M -> M E')
  bias = f'{half}.block.{{layer}}.layer.{router}.bias'
  names[f'{half}/layer/moe/router/b'] = Name(bias, 'E')
  return {path: (name,) for path, name in names.items()}


ARCHITECTURE = Architecture(
  model_type='switch_transformers',
  classes=(
    'SwitchTransformersForConditionalGeneration',
    'SwitchTransformersModel',
  ),
  keys=KEYS,
  settings=settings,
  describe=describe,
  names={
    'embedding': (
      Name('shared.weight', 'V M'),
      Name('encoder.embed_tokens.weight', 'V M'),
      Name('decoder.embed_tokens.weight', 'V M'),
    ),
    'encoder_embedding': (Name('encoder.embed_tokens.weight', 'V M'),),
    'w_logits': (Name('lm_head.weight', 'V M -> M V'),),
    **_stack('encoder'),
    **_stack('decoder'),
  },
)
