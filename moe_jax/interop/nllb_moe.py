"""transformers' NLLB-MoE (arXiv:2207.04672) as an encoder-decoder.

Unlike the paper, and as transformers 5.24 computes it:

- The whole batch is one group (`group_size=-1`): rows compete for slots.
- Evaluation has its own capacity, `moe_eval_capacity_token_fraction` of the
  batch's tokens (`capacity_rule='fraction'`, and 'all' from 1.0 on); only where
  it is not positive `expert_capacity` counts ('fixed'). Here training has
  evaluation's.
- Padding is routed if `router_ignore_padding_tokens` is set, the opposite of
  its name (`route_padding`).
- Tokens are numbered by their ids, not by the mask: one with the id of padding
  has no sinusoid and no number (`position_offset` is that id + 1).
- Where `tie_word_embeddings` is false, the halves have an embedding each, and
  what they would share is not read (`EmbeddingConfig.encoder_table`).
- Whatever experts a token chose, its first choice is served by expert 1 and its
  second by expert 0 (`served_by='transformers_nllb'`): the experts there are
  handed a mask in place of indices.
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
_LAST = 0  # the sparse layer of a period is its last
_EPSILON = 1e-5  # of PyTorch's LayerNorm; no key says it
_ONE_RATE = 'our rates of dropout are one, model.dropout'
_WHOLE = 'whole layers are never dropped here'
KEYS = Keys(
  honoured={
    'vocab_size': (int, 128112),
    'encoder_layers': (int, 12),
    'encoder_ffn_dim': (int, 4096),
    'encoder_attention_heads': (int, 16),
    'decoder_layers': (int, 12),
    'decoder_ffn_dim': (int, 4096),
    'decoder_attention_heads': (int, 16),
    'activation_function': (str, 'relu'),
    'd_model': (int, 1024),
    'scale_embedding': (bool, True),
    'router_bias': (bool, False),
    'router_ignore_padding_tokens': (bool, False),
    'num_experts': (int, 128),
    'expert_capacity': (int, 64),
    'encoder_sparse_step': (int, 4),
    'decoder_sparse_step': (int, 4),
    'normalize_router_prob_before_dropping': (bool, False),
    'batch_prioritized_routing': (bool, False),
    'moe_eval_capacity_token_fraction': (float, 1.0),
    'moe_token_dropout': (float, 0.2),
    'pad_token_id': (int, 1),
    'tie_word_embeddings': (bool, True),
  },
  training={
    'dropout': (float, 0.1, ..., ''),
    'attention_dropout': (float, 0.1, 'dropout', _ONE_RATE),
    'activation_dropout': (float, 0.0, 'dropout', _ONE_RATE),
    'encoder_layerdrop': (float, 0.05, 0.0, _WHOLE),
    'decoder_layerdrop': (float, 0.05, 0.0, _WHOLE),
    'router_z_loss_coef': (float, 0.001, ..., ''),
    'router_aux_loss_coef': (float, 0.001, ..., ''),
  },
  fixed={
    **COMMON_FIXED,
    'is_encoder_decoder': (True,),
    'router_dtype': ('float32',),
    # The others draw a second expert at random, in evaluation too.
    'second_expert_policy': ('all',),
  },
  ignored={
    **COMMON_IGNORED,
    'init_std': 'the parameters are there',
    'max_position_embeddings': 'sinusoids have no table',
    'num_hidden_layers': 'it is encoder_layers under another name',
    'router_type': 'transformers does nothing with it',
  },
)


def settings(c: Values) -> tuple[Settings, list[str]]:
  """Our `model` section, and what is wrong."""
  problems: list[str] = []
  if c.num_experts < 2:
    problems.append(f'num_experts={c.num_experts} must be at least 2')
  for half in ('encoder', 'decoder'):
    heads = getattr(c, f'{half}_attention_heads')
    if heads < 1 or c.d_model % heads:
      problems.append(
        f'{half}_attention_heads={heads} does not divide d_model={c.d_model}'
      )
  return dict(
    kind='encoder_decoder',
    vocab_size=c.vocab_size,
    num_layers=c.decoder_layers,
    num_encoder_layers=c.encoder_layers,
    width=c.d_model,
    num_heads=c.decoder_attention_heads,
    encoder_heads=c.encoder_attention_heads,
    hidden=c.decoder_ffn_dim,
    encoder_hidden=c.encoder_ffn_dim,
    activation=activation(
      c.activation_function, _ACTIVATIONS, 'activation_function', problems
    ),
    norm='layernorm',
    norm_epsilon=_EPSILON,
    positions='sinusoidal',
    position_offset=c.pad_token_id + 1,
    use_bias=True,
    tie_embeddings=c.tie_word_embeddings,
    embedding_scale='sqrt_width' if c.scale_embedding else 'none',
    dropout=float(c.dropout),
    moe=dict(
      num_experts=c.num_experts,
      num_selected=2,
      layers=_sparse(c.decoder_layers, c.decoder_sparse_step),
      encoder_layers=_sparse(c.encoder_layers, c.encoder_sparse_step),
      gates=(
        'renormalized'
        if c.normalize_router_prob_before_dropping
        else 'renormalized_after_drop'
      ),
      slot_priority=(
        'batch_priority' if c.batch_prioritized_routing else 'choice_major'
      ),
      router_bias=c.router_bias,
      served_by='transformers_nllb',
      output_masking=float(c.moe_token_dropout),
      route_padding=c.router_ignore_padding_tokens,
      group_size=-1,
      # Where slots run out, as they may in an evaluation of a run's own.
      allow_future_leak=True,
      balance_weight=float(c.router_aux_loss_coef),
      z_weight=float(c.router_z_loss_coef),
      **_capacity(c, problems),
    ),
  ), problems


def _sparse(num_layers: int, step: int) -> str:
  sparse = [i for i in range(num_layers) if is_sparse(i, step, _LAST)]
  return layers(sparse, num_layers)


def _capacity(c: Values, problems: list[str]) -> Settings:
  """Of evaluation."""
  fraction = float(c.moe_eval_capacity_token_fraction)
  if fraction >= 1:
    return dict(capacity_rule='all')
  if fraction > 0:
    return dict(capacity_rule='fraction', capacity_factor=fraction)
  if c.expert_capacity < 1:
    problems.append(f'expert_capacity={c.expert_capacity} must be at least 1')
  return dict(capacity_rule='fixed', capacity_slots=c.expert_capacity)


def describe(c: EncoderDecoderConfig) -> dict[str, Any]:
  """The keys of config.json that a model decides."""
  moe, block = c.moe, c.decoder.block
  if moe is None:
    raise ValueError('it is dense; NLLB-MoE has experts')
  router, capacity = moe.router, moe.router.capacity
  fraction = dict(all=1.0, fraction=capacity.factor).get(capacity.rule, -1.0)
  return dict(
    vocab_size=c.vocab_size,
    activation_function=written(block.ffn.activation, _ACTIVATIONS),
    d_model=c.embedding.width,
    scale_embedding=c.embedding.embedding_scale == 'sqrt_width',
    router_bias=router.use_bias,
    router_ignore_padding_tokens=moe.route_padding,
    num_experts=router.num_experts,
    normalize_router_prob_before_dropping=router.gates == 'renormalized',
    batch_prioritized_routing=router.slot_priority == 'batch_priority',
    moe_eval_capacity_token_fraction=fraction,
    moe_token_dropout=moe.output_masking,
    pad_token_id=max(c.embedding.position_offset - 1, 0),
    tie_word_embeddings=c.embedding.tie_embeddings,
    dropout=block.dropout,
    is_encoder_decoder=True,
    **({'expert_capacity': capacity.slots} if fraction < 0 else {}),
    **_half('encoder', c.encoder),
    **_half('decoder', c.decoder),
  )


def _half(name, stack) -> dict[str, Any]:
  step = period(stack.sparse, _LAST)
  if step is None:
    raise ValueError(
      f'sparse layers {stack.sparse} of the {name} are not those of any step'
    )
  return {
    f'{name}_layers': len(stack.sparse),
    f'{name}_ffn_dim': stack.block.ffn.hidden,
    f'{name}_attention_heads': stack.block.attention.num_heads,
    f'{name}_sparse_step': step,
  }


def _stack(half: str) -> dict[str, tuple[Name, ...]]:
  names = {}

  def pair(path, theirs, weight, bias, weight_form, bias_form):
    names[f'{half}/{path}/{weight}'] = Name(f'{theirs}.weight', weight_form)
    names[f'{half}/{path}/{bias}'] = Name(f'{theirs}.bias', bias_form)

  def norm(path, theirs):
    pair(path, f'model.{half}.{theirs}', 'scale', 'bias', 'M', 'M')

  def attention(path, theirs):
    norm(f'layer/{path}_norm', f'layers.{{layer}}.{theirs}_layer_norm')
    theirs = f'model.{half}.layers.{{layer}}.{theirs}'
    path = f'layer/{path}'
    for name, letter in (('query', 'q'), ('key', 'k'), ('value', 'v')):
      pair(
        path, f'{theirs}.{letter}_proj', f'w_{name}', f'b_{name}',
        '(H D) M -> M H D', '(H D) -> H D',
      )  # fmt: skip
    pair(path, f'{theirs}.out_proj', 'w_out', 'b_out', 'M (H D) -> H D M', 'M')

  norm('final_norm', 'layer_norm')
  attention('attention', 'self_attn')
  if half == 'decoder':
    attention('cross_attention', 'cross_attention')
  norm('layer/ffn_norm', 'layers.{layer}.ff_layer_norm')
  ffn = f'model.{half}.layers.{{layer}}.ffn'
  for path, theirs in (
    ('layer/ffn', ffn),
    ('layer/moe/experts', f'{ffn}.experts.expert_{{expert}}'),
  ):
    pair(path, f'{theirs}.fc1', 'w_in', 'b_in', 'F M -> M F', 'F')
    pair(path, f'{theirs}.fc2', 'w_out', 'b_out', 'M F -> F M', 'M')
  pair(
    'layer/moe/router', f'{ffn}.router.classifier', 'w', 'b', 'E M -> M E', 'E'
  )
  return {path: (name,) for path, name in names.items()}


ARCHITECTURE = Architecture(
  model_type='nllb-moe',
  classes=('NllbMoeForConditionalGeneration', 'NllbMoeModel'),
  keys=KEYS,
  settings=settings,
  describe=describe,
  prefix='model.',
  computed=(r'embed_positions\.weights$', r'\.version$'),
  names={
    'embedding': (
      Name('model.shared.weight', 'V M'),
      Name('model.encoder.embed_tokens.weight', 'V M'),
      Name('model.decoder.embed_tokens.weight', 'V M'),
    ),
    'encoder_embedding': (Name('model.encoder.embed_tokens.weight', 'V M'),),
    'w_logits': (Name('lm_head.weight', 'V M -> M V'),),
    **_stack('encoder'),
    **_stack('decoder'),
  },
)
