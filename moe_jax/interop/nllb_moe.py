"""transformers' NLLB-MoE (arXiv:2207.04672) as an encoder-decoder.

Unlike the paper, and as transformers 5.24 computes it:

- The whole batch is one group (`group_size=-1`): rows compete for slots.
- Evaluation has its own capacity, `moe_eval_capacity_token_fraction` of the
  batch's tokens (the capacity `Fraction`, and `All` from 1.0 on); only if that
  is not positive, `expert_capacity` counts (`Fixed`). Here training has the
  capacity of evaluation.
- Padding is routed if `router_ignore_padding_tokens` is set, contrary to its
  name (`quirks.RoutedPadding`).
- Positions are counted by token ids, not by the mask: a token with the id of
  padding has no sinusoid and is not counted (the offset of `Sinusoidal` is the
  id of padding + 1).
- If `tie_word_embeddings` is false, encoder and decoder each have an embedding,
  and the shared one is not read (`encoder_table`).
- Whatever experts a token chose, its first choice is served by expert 1 and its
  second by expert 0 (`quirks.ServedByRank`), as the experts there are given a
  mask instead of indices.
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
from moe_jax.interop.quirks import ServedByRank, TransformersEncoderDecoder
from moe_jax.layers.attention import AttentionOptions
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.norms import LayerNorm
from moe_jax.layers.positions import Relative, Sinusoidal
from moe_jax.models import EncoderDecoderOptions
from moe_jax.models.embeddings import EmbeddingOptions
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.models.layer_options import StackOptions
from moe_jax.routing.capacity import All, Capacity, Fixed, Fraction

_LAST = 0  # the sparse layer of a period is its last
_EPSILON = 1e-5  # the default of PyTorch's LayerNorm, which no key changes
_ONE_RATE = 'our rates of dropout are one, model.dropout'
_WHOLE = 'whole layers are never dropped here'
KEYS = Keys(
  honoured={
    'vocab_size': (config_keys.SIZE, 128112),
    'encoder_layers': (config_keys.LAYERS, 12),
    'encoder_ffn_dim': (config_keys.SIZE, 4096),
    'encoder_attention_heads': (config_keys.SIZE, 16),
    'decoder_layers': (config_keys.LAYERS, 12),
    'decoder_ffn_dim': (config_keys.SIZE, 4096),
    'decoder_attention_heads': (config_keys.SIZE, 16),
    'activation_function': (str, 'relu'),
    'd_model': (config_keys.SIZE, 1024),
    'scale_embedding': (bool, True),
    'router_bias': (bool, False),
    'router_ignore_padding_tokens': (bool, False),
    'num_experts': (config_keys.SIZE, 128),
    'expert_capacity': (config_keys.COUNT, 64),
    'encoder_sparse_step': (config_keys.COUNT, 4),
    'decoder_sparse_step': (config_keys.COUNT, 4),
    'normalize_router_prob_before_dropping': (bool, False),
    'batch_prioritized_routing': (bool, False),
    'moe_eval_capacity_token_fraction': (config_keys.FINITE, 1.0),
    'moe_token_dropout': (config_keys.RATE, 0.2),
    'pad_token_id': (config_keys.COUNT, 1),
    'tie_word_embeddings': (bool, True),
  },
  training={
    'dropout': (config_keys.RATE, 0.1, ..., ''),
    'attention_dropout': (config_keys.RATE, 0.1, 'dropout', _ONE_RATE),
    'activation_dropout': (config_keys.RATE, 0.0, 'dropout', _ONE_RATE),
    'encoder_layerdrop': (config_keys.RATE, 0.05, 0.0, _WHOLE),
    'decoder_layerdrop': (config_keys.RATE, 0.05, 0.0, _WHOLE),
    'router_z_loss_coef': (config_keys.AMOUNT, 0.001, ..., ''),
    'router_aux_loss_coef': (config_keys.AMOUNT, 0.001, ..., ''),
  },
  fixed={
    **config_keys.COMMON_FIXED,
    'is_encoder_decoder': (True,),
    'router_dtype': ('float32',),
    # All other policies draw second experts at random, also in evaluation.
    'second_expert_policy': ('all',),
  },
  ignored=(
    *config_keys.COMMON_IGNORED,
    'init_std',  # the parameters are there
    'max_position_embeddings',  # sinusoids have no table
    'num_hidden_layers',  # it is encoder_layers under another name
    'router_type',  # transformers does nothing with it
  ),
)


def problems(c: Values) -> list[str]:
  """A text for each value of config.json that our models cannot express."""
  errors = activation_problems(
    'activation_function', c.activation_function, ACTIVATIONS
  )
  if c.num_experts < 2:
    errors.append(f'num_experts={c.num_experts} must be at least 2')
  for half in ('encoder', 'decoder'):
    heads = getattr(c, f'{half}_attention_heads')
    if c.d_model % heads:
      errors.append(
        f'{half}_attention_heads={heads} does not divide d_model={c.d_model}'
      )
  if c.moe_eval_capacity_token_fraction <= 0 and c.expert_capacity < 1:
    errors.append(f'expert_capacity={c.expert_capacity} must be at least 1')
  return errors


def options(c: Values) -> TransformersEncoderDecoder:
  """The options of the model that a config.json describes."""
  sparse = _sparse(c.encoder_layers, c.encoder_sparse_step)
  encoder = {
    'attention': {'num_heads': c.encoder_attention_heads},
    'ffn': {'hidden': c.encoder_ffn_dim},
    'moe': {'layers': sparse},
  }
  norm_first = c.normalize_router_prob_before_dropping
  by_batch = c.batch_prioritized_routing
  return TransformersEncoderDecoder(
    vocab_size=c.vocab_size,
    num_layers=c.decoder_layers,
    encoder=EncoderOptions(c.encoder_layers, encoder),
    width=c.d_model,
    attention=AttentionOptions(num_heads=c.decoder_attention_heads),
    ffn=FfnOptions(c.decoder_ffn_dim, ACTIVATIONS[c.activation_function]),
    norm=LayerNorm(_EPSILON),
    positions=Sinusoidal(c.pad_token_id + 1),
    use_bias=True,
    embedding=EmbeddingOptions(
      tie=c.tie_word_embeddings,
      scale='sqrt_width' if c.scale_embedding else 'none',
    ),
    dropout=float(c.dropout),
    route_padding=c.router_ignore_padding_tokens,
    moe=MoeOptions(
      num_experts=c.num_experts,
      num_selected=2,
      layers=_sparse(c.decoder_layers, c.decoder_sparse_step),
      group_size=-1,
      output_masking=float(c.moe_token_dropout),
      # Without this option a causal model is refused whose capacity drops
      # tokens, as later tokens can take the slots of earlier ones.
      allow_future_leak=True,
      router=ServedByRank(
        gates='renormalized' if norm_first else 'renormalized_after_drop',
        slot_priority='batch_priority' if by_batch else 'choice_major',
        use_bias=c.router_bias,
        balance_weight=float(c.router_aux_loss_coef),
        z_weight=float(c.router_z_loss_coef),
      ),
      capacity=_capacity(c),
    ),
  )


def _sparse(num_layers: int, step: int) -> str:
  return layers(sparse_flags(num_layers, step, _LAST))


def _capacity(c: Values) -> Capacity:
  """The capacity that transformers gives the experts in evaluation."""
  fraction = float(c.moe_eval_capacity_token_fraction)
  if fraction >= 1:
    return All()
  return Fraction(fraction) if fraction > 0 else Fixed(c.expert_capacity)


def _capacity_keys(capacity: Capacity) -> dict[str, Any]:
  """The keys of config.json that a capacity decides, with their values."""
  fraction, keys = 1.0, {}
  if isinstance(capacity, Fraction):
    fraction = capacity.factor
  elif isinstance(capacity, Fixed):
    fraction, keys = -1.0, {'expert_capacity': capacity.slots}
  return {'moe_eval_capacity_token_fraction': fraction, **keys}


def describe(o: EncoderDecoderOptions) -> dict[str, Any]:
  """The keys and values of config.json for a model; ValueError if none fit."""
  if not o.has_encoder:
    raise InputError('it has no encoder')
  encoder = o.encoder_half
  router = o.moe.router
  gates, priority = (
    getattr(router, name, '') for name in ('gates', 'slot_priority')
  )
  return dict(
    vocab_size=o.vocab_size,
    activation_function=their_activation(o.ffn.activation, ACTIVATIONS),
    d_model=o.width,
    scale_embedding=o.embedding.scale == 'sqrt_width',
    router_bias=getattr(router, 'use_bias', False),
    router_ignore_padding_tokens=getattr(o, 'route_padding', False),
    num_experts=o.moe.num_experts,
    normalize_router_prob_before_dropping=gates == 'renormalized',
    batch_prioritized_routing=priority == 'batch_priority',
    moe_token_dropout=o.moe.output_masking,
    pad_token_id=max(getattr(o.positions, 'offset', 0) - 1, 0),
    tie_word_embeddings=o.embedding.tie,
    dropout=o.dropout,
    is_encoder_decoder=True,
    **_capacity_keys(o.moe.capacity),
    **_stack_keys('encoder', encoder, o.width),
    **_stack_keys('decoder', o, o.width),
  )


def _stack_keys(name: str, stack: StackOptions, width: int) -> dict[str, Any]:
  return {
    f'{name}_layers': stack.num_layers,
    f'{name}_ffn_dim': stack.ffn.hidden,
    f'{name}_attention_heads': plain_attention(stack, width).num_heads,
    f'{name}_sparse_step': period(stack.sparse, _LAST),
  }


def _stack(half: str) -> dict[str, tuple[Name, ...]]:
  names = {}

  def pair(path, module, weight, bias, weight_form, bias_form):
    names[f'{half}/{path}/{weight}'] = Name(f'{module}.weight', weight_form)
    names[f'{half}/{path}/{bias}'] = Name(f'{module}.bias', bias_form)

  def norm(path, module):
    pair(path, f'model.{half}.{module}', 'scale', 'bias', 'M', 'M')

  def attention(path, module):
    norm(f'layer/{path}_norm', f'layers.{{layer}}.{module}_layer_norm')
    module = f'model.{half}.layers.{{layer}}.{module}'
    path = f'layer/{path}'
    for name, letter in (('query', 'q'), ('key', 'k'), ('value', 'v')):
      pair(
        path, f'{module}.{letter}_proj', f'w_{name}', f'b_{name}',
        '(H D) M -> M H D', '(H D) -> H D',
      )  # fmt: skip
    pair(path, f'{module}.out_proj', 'w_out', 'b_out', 'M (H D) -> H D M', 'M')

  norm('final_norm', 'layer_norm')
  attention('attention', 'self_attn')
  if half == 'decoder':
    attention('cross_attention', 'cross_attention')
  norm('layer/ffn_norm', 'layers.{layer}.ff_layer_norm')
  ffn = f'model.{half}.layers.{{layer}}.ffn'
  for path, module in (
    ('layer/ffn', ffn),
    ('layer/moe/experts', f'{ffn}.experts.expert_{{expert}}'),
  ):
    pair(path, f'{module}.fc1', 'w_in', 'b_in', 'F M -> M F', 'F')
    pair(path, f'{module}.fc2', 'w_out', 'b_out', 'M F -> F M', 'M')
  pair(
    'layer/moe/router', f'{ffn}.router.classifier', 'w', 'b', 'E M -> M E', 'E'
  )
  return {path: (name,) for path, name in names.items()}


ARCHITECTURES = (
  Architecture(
    model_type='nllb-moe',
    classes=('NllbMoeForConditionalGeneration', 'NllbMoeModel'),
    keys=KEYS,
    problems=problems,
    options=options,
    describe=describe,
    suits=lambda o: o.has_encoder and not isinstance(o.positions, Relative),
    unnumbered_id=lambda o: o.positions.offset - 1,
    prefix='model.',
    computed_tensors=(r'embed_positions\.weights$', r'\.version$'),
    names={
      **embedding_tables('model.'),
      **_stack('encoder'),
      **_stack('decoder'),
    },
  ),
)
